# SPDX-License-Identifier: Apache-2.0

"""``transformers serve`` by its real command, on a free port of this machine until it is left."""

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai

from tests.newest_transformers import newest_python, newest_variables

START_SECONDS = 180


@contextmanager
def transformers_serve(model: Path) -> Iterator[openai.OpenAI]:
    """A client of ``transformers serve MODEL``, which calls the model by its path."""
    command = [newest_python().parent / "transformers", "serve", model, "--device", "cpu"]
    with _serving([*map(str, command)], environment=newest_variables(), folder=model.parent) as url:
        # It closes the connection after an error, which a retry mends.
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1, timeout=60)


@contextmanager
def _serving(
    command: Sequence[str], *, environment: dict[str, str] | None = None, folder: Path | None = None
) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"{command[0]} did not start"
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.communicate()

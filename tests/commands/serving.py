# SPDX-License-Identifier: Apache-2.0

"""Servers and the page by their real commands, each on a free port of this machine until it is left."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
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
def gmai_serve(model: Path) -> Iterator[openai.OpenAI]:
    """A client of ``python -m gmai_xtuner.serve MODEL``, which calls the model by its folder's name."""
    command = [sys.executable, "-m", "gmai_xtuner.serve", str(model), "--device", "cpu"]
    with _serving(command) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def gmai_demo(*models: Path) -> Iterator[str]:
    """The address of the page ``python -m gmai_xtuner.demo MODEL...``."""
    command = [sys.executable, "-m", "gmai_xtuner.demo", *map(str, models)]
    with subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.match(r"open (http://127\.0\.0\.1:\d+/)", line):
                    yield found[1]
                    return
            raise AssertionError(f"the page did not start: {''.join(lines)}")
        finally:
            process.kill()


@contextmanager
def _serving(
    command: Sequence[str],
    *,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
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

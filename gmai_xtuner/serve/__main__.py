# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.serve MODEL [--port 8000] [--api-key-env NAME] ...``

Exit status: 0 after a request to stop, 1 after an error, 2 if the command line can't be understood.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gmai_xtuner.cli import (
    add_api_key_argument,
    add_limits,
    add_model_arguments,
    exit_status,
    load_from_arguments,
    positive_int,
)
from gmai_xtuner.core.addresses import impatient_protocol, is_loopback, reserved
from gmai_xtuner.core.errors import GMAIError

MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    key = os.environ.get(options.api_key_env, "").strip() if options.api_key_env else None
    if options.api_key_env and not key:
        parser.error(f"the environment variable {options.api_key_env} has no key")
    if key is None and not options.without_key and not is_loopback(options.host):
        parser.error(
            f"{options.host} can be reached from other machines: name the variable that holds a key with "
            "--api-key-env, or allow everyone with --without-key"
        )
    return exit_status(partial(_serve, options, key))


def _serve(options: argparse.Namespace, key: str | None) -> int:
    try:
        import uvicorn

        from gmai_xtuner.serve.app import Server
    except ModuleNotFoundError as error:
        raise GMAIError(
            f'{error.name} is not installed. Install what serving needs: pip install -e ".[serve]"'
        ) from error
    from gmai_xtuner.loading import describe
    from gmai_xtuner.serve.protocol import Limits

    with reserved(options.host, options.port) as own:  # before a large model is read
        predictor = load_from_arguments(options)
        name = options.name or Path(options.model).resolve().name
        server = Server(
            predictor,
            name=name,
            key=key,
            only_loopback_names=key is None and not options.without_key,
            limits=Limits(
                body_bytes=options.max_request_mib * MIB,
                images=options.max_images,
                image_bytes=options.max_image_mib * MIB,
                pixels=options.max_pixels,
            ),
            max_new_tokens=options.max_new_tokens,
            max_waiting=options.max_waiting,
            timeout=options.timeout,
        )
        print(f"{options.model}\n{describe(predictor)}", file=sys.stderr)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(
            f"serving {name!r} at http://{host}:{own.getsockname()[1]}/v1, "
            f"{'with a key' if key else 'without a key'}; not for clinical use",
            file=sys.stderr,
            flush=True,
        )
        protocol = impatient_protocol()
        running = uvicorn.Server(
            uvicorn.Config(server.app, http=protocol, log_level="info", timeout_graceful_shutdown=5)
        )
        with contextlib.suppress(KeyboardInterrupt):
            running.run(sockets=[own])
        return 0 if running.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m gmai_xtuner.serve",
        description="Serve a trained model by the OpenAI API (/v1/chat/completions, with images as data "
        "URLs). Images are read as in training. Not for clinical use.",
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    add("--name", help="what clients call the model (default: the folder's name)")
    add_api_key_argument(group, "environment variable with the key that clients must show")
    add("--without-key", action="store_true", help="let other machines ask without a key")
    add_limits(
        parser.add_argument_group("limits"),
        ("--max-new-tokens", positive_int, 4096, "tokens that a request may ask for"),
        ("--max-waiting", positive_int, 32, "requests that may wait for the one that is computed"),
        ("--max-images", positive_int, 16, "images of a request, all turns together"),
        ("--max-image-mib", positive_int, 20, "size of an image's file"),
        ("--max-request-mib", positive_int, 64, "size of a request"),
        ("--max-pixels", positive_int, 100_000_000, "width x height of an image"),
        ("--timeout", positive_int, 60, "seconds in which a request must arrive, and then be read"),
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.demo MODEL [MODEL_B] [--port 7860] ...``

Exit status: 0 ended by a signal, 1 the model or the address can't be used, 2 the command line can't be
understood.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gmai_xtuner.cli import (
    add_allow_pickle,
    add_dtype_argument,
    load_from_arguments,
    positive_int,
    positive_number,
)
from gmai_xtuner.core.errors import GMAIError

if TYPE_CHECKING:
    from gmai_xtuner.demo.answering import LoadedModel

PORT = 7860


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(arguments)
    # uvicorn ends well on SIGTERM and then raises it again
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options)
    except GMAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _run(options: argparse.Namespace) -> int:
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise GMAIError(
            f'the page needs the extra "demo" ({error}). Install it: pip install -e ".[demo]"'
        ) from error
    from gmai_xtuner.core.addresses import is_loopback, reserved
    from gmai_xtuner.demo.answering import Answering
    from gmai_xtuner.demo.examples import examples_of, installed_examples
    from gmai_xtuner.demo.limits import MEBIBYTE, Limits
    from gmai_xtuner.demo.page import Demo
    from gmai_xtuner.demo.server import serve

    if not is_loopback(options.host) and not options.without_sign_in:
        raise GMAIError(
            f"{options.host} can be reached from other machines, and the page asks for no password. Put a "
            "proxy that does in front of 127.0.0.1 (--allow-host), or let everyone in with --without-sign-in"
        )
    examples = installed_examples() if options.examples is None else examples_of(options.examples)
    limits = Limits(
        upload_bytes=int(options.max_upload_mb * MEBIBYTE),
        pixels=options.max_pixels,
        voxels=options.max_voxels,
        memory_bytes=int(options.max_memory_mb * MEBIBYTE),
    )
    with reserved(options.host, options.port) as own:
        models = _models(options)
        for model in models:
            print(f"{model.name}: {model.facts}")
        host, port = own.getsockname()[:2]
        shown = f"[{host}]" if ":" in str(host) else host
        demo = Demo(
            Answering(models, max_waiting=limits.waiting),
            limits=limits,
            examples=examples,
            language=options.language,
        )
        serve(
            demo,
            own=own,
            names=options.allow_host,
            ready=lambda: print(f"open http://{shown}:{port}/  (Ctrl-C ends it)", flush=True),
        )
    return 0


def _models(options: argparse.Namespace) -> list[LoadedModel]:
    from gmai_xtuner.demo.answering import LoadedModel

    asked = [(options.model, options.llm, options.vision)]
    if options.model_b:
        asked.append((options.model_b, options.llm_b, options.vision_b))
    folders = [Path(model).resolve() for model, _, _ in asked]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    loaded = []
    for name, (model, llm, vision) in zip(names, asked, strict=True):
        print(f"loading {model}", file=sys.stderr, flush=True)
        own = {
            "model": model,
            "llm": llm,
            "vision": vision,
            "prompt_template": None,
            "add_bos": None,
        }
        try:
            predictor = load_from_arguments(argparse.Namespace(**{**vars(options), **own}))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            # What transformers, safetensors and torch say of a folder that is no model, or a damaged one.
            kind = "" if isinstance(error, GMAIError) else f"{type(error).__name__}: "
            words = " ".join(str(error).split())[:500]
            raise GMAIError(f"model {model!r} can't be loaded: {kind}{words}") from error
        loaded.append(LoadedModel(name, predictor))
    return loaded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gmai_xtuner.demo",
        description="A page to try one model, or two side by side. Not for clinical use.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of an exported model")
    parser.add_argument(
        "model_b",
        metavar="MODEL_B",
        nargs="?",
        help="a second one, which answers the same questions",
    )
    for letter, which in (("", "MODEL"), ("-b", "MODEL_B")):
        parser.add_argument(
            f"--llm{letter}", metavar="BASE", help=f"language model of {which}, if that has none"
        )
        parser.add_argument(
            f"--vision{letter}", metavar="BASE", help=f"vision tower of {which}, if that has none"
        )
    add_dtype_argument(parser)
    add_allow_pickle(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve (default: this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"0 takes a free one (default {PORT})"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which a proxy on this machine is visited; can be repeated",
    )
    parser.add_argument(
        "--without-sign-in",
        action="store_true",
        help="let everyone who reaches --host use the page; a proxy in front can ask for a password",
    )
    for option, kind, default, what in (
        ("--max-upload-mb", positive_number, 256.0, "MiB of one upload"),
        ("--max-pixels", positive_int, 50_000_000, "of one image"),
        ("--max-voxels", positive_int, 300_000_000, "of one volume"),
        ("--max-memory-mb", positive_number, 4096.0, "MiB of the opened images of all visitors"),
    ):
        parser.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{what} (default {default:.0f})"
        )
    parser.add_argument(
        "--examples",
        metavar="FOLDER",
        help="image files to pick from, in place of the built-in ones",
    )
    parser.add_argument(
        "--language", choices=("en", "zh"), default="en", help="the page begins with"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

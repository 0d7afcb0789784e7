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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gmai_xtuner.cli import (
    add_allow_pickle,
    add_device_arguments,
    add_limits,
    exit_status,
    load_from_arguments,
    positive_int,
    positive_number,
)
from gmai_xtuner.core.errors import GMAIError

if TYPE_CHECKING:
    from gmai_xtuner.demo.conversation import LoadedModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(arguments)
    # uvicorn ends well on SIGTERM and then raises it again
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_status(partial(_run, options), interrupted=0)


def _run(options: argparse.Namespace) -> None:
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise GMAIError(
            f'the page needs the extra "demo" ({error}). Install it: pip install -e ".[demo]"'
        ) from error
    from gmai_xtuner.core.addresses import is_loopback, reserved
    from gmai_xtuner.demo.conversation import Answering
    from gmai_xtuner.demo.files import examples_of, installed_examples
    from gmai_xtuner.demo.server import Demo, serve
    from gmai_xtuner.demo.studies import MEBIBYTE, Limits

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
        answering = Answering(models, max_waiting=limits.waiting)
        demo = Demo(answering, limits=limits, examples=examples, language=options.language)
        ready = partial(print, f"open http://{shown}:{port}/  (Ctrl-C ends it)", flush=True)
        serve(demo, own=own, names=options.allow_host, ready=ready)


def _models(options: argparse.Namespace) -> list[LoadedModel]:
    from gmai_xtuner.demo.conversation import LoadedModel

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
        own = {"model": model, "llm": llm, "vision": vision}
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
        allow_abbrev=False,
        prog="python -m gmai_xtuner.demo",
        description="A page to try one model, or two side by side. Not for clinical use.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of an exported model")
    add("model_b", metavar="MODEL_B", nargs="?", help="a second one, asked the same questions")
    for option, part in (("llm", "language model"), ("vision", "vision tower")):
        for suffix, which in (("", "MODEL"), ("-b", "MODEL_B")):
            text = f"{part} of {which}, if that has none"
            add(f"--{option}{suffix}", metavar="BASE", help=text)
    add_device_arguments(parser)
    add_allow_pickle(parser)
    add("--host", default="127.0.0.1", help="address to serve (default: this machine only)")
    add("--port", type=int, default=7860, help="0 takes a free one (default 7860)")
    text = "name by which a proxy on this machine is visited; can be repeated"
    add("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "let everyone who reaches --host use the page; a proxy in front can ask for a password"
    add("--without-sign-in", action="store_true", help=text)
    add_limits(
        parser,
        ("--max-upload-mb", positive_number, 256, "MiB of one upload"),
        ("--max-pixels", positive_int, 50_000_000, "of one image"),
        ("--max-voxels", positive_int, 300_000_000, "of one volume"),
        ("--max-memory-mb", positive_number, 4096, "MiB of the opened images of all visitors"),
    )
    text = "image files to pick from, in place of the built-in ones"
    add("--examples", metavar="FOLDER", help=text)
    add("--language", choices=("en", "zh"), default="en", help="the page begins with")
    return parser


if __name__ == "__main__":
    sys.exit(main())

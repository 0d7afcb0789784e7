# SPDX-License-Identifier: Apache-2.0

"""Options and habits that all commands share: which model, how precise, where the report goes.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from gmai_xtuner.generate import Predictor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def positive_int(text: str) -> int:
    """Parse a whole number above 0, as ``type`` of an argument."""
    with suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"must be above 0, a whole number, got {text!r}")


def positive_number(text: str) -> float:
    """Parse a finite number above 0, as ``type`` of an argument."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def dtype_name(text: str) -> str:
    """Parse ``bf16``, ``fp16``, ``fp32`` or torch's long name of one of them; return the long name."""
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")
    return name


def add_dtype_argument(
    parser: argparse._ActionsContainer,
    default: str | None = None,
    *,
    unset: str = "bf16 on a GPU, fp32 on the CPU",
) -> None:
    """Add ``--dtype``, the precision of the weights; ``options.dtype`` is torch's name of it or ``None``."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        default=default and DTYPES[default],
        metavar="|".join(DTYPES),
        help=f"precision of the weights (default: {default or unset})",
    )


def add_api_key_argument(
    parser: argparse._ActionsContainer, help: str, *, option: str = "--api-key-env"
) -> None:
    """Add ``--api-key-env NAME``: the environment variable that holds a key, never the key itself."""
    parser.add_argument(option, metavar="NAME", help=help)


class _AllowPickle(argparse.Action):
    def __call__(self, *_: object) -> None:
        os.environ["GMAI_ALLOW_PICKLE"] = "1"


def add_allow_pickle(parser: argparse._ActionsContainer) -> None:
    """Add ``--allow-pickle``, which holds for the process and those it starts."""
    text = "also read weights that are a pickle (pytorch_model.bin); tensors alone, nothing is run"
    kept = argparse.SUPPRESS
    parser.add_argument("--allow-pickle", action=_AllowPickle, nargs=0, default=kept, help=text)


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    """Add ``--dtype`` and ``--device``."""
    add_dtype_argument(parser)
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: the GPU if there is one)")


def add_limits(
    parser: argparse._ActionsContainer, *limits: tuple[str, Callable[[str], float], float, str]
) -> None:
    """Add options that take a number: their name, type, default and what the number is of."""
    for option, kind, default, what in limits:
        text = f"{what} (default {default})"
        parser.add_argument(option, type=kind, default=default, metavar="N", help=text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``MODEL`` and the options that say how it is loaded."""
    parser.add_argument("model", metavar="MODEL", help="folder with the weights of a trained model")
    group = parser.add_argument_group("model")
    add, either = group.add_argument, argparse.BooleanOptionalAction
    add("--llm", help="the language model's base, for an export of stage 1 or 2, which has none")
    add("--vision", help="the vision tower's base, for an export of stage 1")
    add_device_arguments(group)
    text = "xtuner's, such as internlm2_chat (default: what the folder says)"
    add("--prompt-template", metavar="NAME", help=text)
    add("--add-bos", action=either, help="begin prompts with <s> (default: what the folder says)")
    add_allow_pickle(group)


def load_from_arguments(options: argparse.Namespace) -> Predictor:
    """Load the model that the options of :func:`add_model_arguments` name, by ``load_model``."""
    import torch

    from gmai_xtuner.loading import load_model

    return load_model(
        options.model,
        llm=options.llm,
        vision=options.vision,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        prompt_template=getattr(options, "prompt_template", None),
        add_bos=getattr(options, "add_bos", None),
    )


def exit_status(command: Callable[[], int | None], *, interrupted: int = 130) -> int:
    """Run a command, which returns its exit status or ``None``; print an error that needs no traceback.

    ``interrupted`` is the exit status after Ctrl-C.
    """
    try:
        return command() or 0
    except BrokenPipeError:  # whoever read the output has gone
        return 1
    except KeyboardInterrupt:
        return interrupted
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def only_the_report_on_stdout() -> Iterator[TextIO]:
    """Give the real standard output, in UTF-8; everything else that is printed goes to standard error.

    Importing DeepSpeed prints, and libraries written in C print past ``sys.stdout``; a script that reads
    a report or an answer must not read that.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)

"""What every command that asks a model has in common: which model, and in which form."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gmai_xtuner.generate import Predictor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``MODEL``, ``--llm``, ``--vision``, ``--dtype``, ``--device``, ``--prompt-template``, ``--add-bos``."""
    parser.add_argument("model", metavar="MODEL", help="folder with the weights of a trained model")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--llm", help="the language model's base, for an export of stage 1 or 2, which has none"
    )
    group.add_argument("--vision", help="the vision tower's base, for an export of stage 1")
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on the CPU)"
    )
    group.add_argument("--device", help="such as cuda:1 or cpu (default: the GPU if there is one)")
    group.add_argument(
        "--prompt-template",
        metavar="NAME",
        help="xtuner's, such as internlm2_chat (default: what the folder says)",
    )
    group.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin prompts with <s> (default: what the folder says)",
    )


def load_from_arguments(options: argparse.Namespace) -> Predictor:
    """The model that :func:`add_model_arguments` was told of.

    Raises:
        ModelLoadError: as :func:`gmai_xtuner.loading.load_model`.
    """
    import torch

    from gmai_xtuner.loading import load_model

    return load_model(
        options.model,
        llm=options.llm,
        vision=options.vision,
        dtype=getattr(torch, DTYPES[options.dtype]) if options.dtype else None,
        device=options.device,
        prompt_template=options.prompt_template,
        add_bos=options.add_bos,
    )


def positive(text: str) -> int:
    """A whole number above 0, for ``type`` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, a whole number, got {text!r}")
    return value

# SPDX-License-Identifier: Apache-2.0

"""Write a released or foreign model as an export of ours, whole and with adapters merged.

``python -m gmai_xtuner.import_model RELEASE OUT`` reads every layout that :mod:`gmai_xtuner.loading` does and
writes xtuner's layout, from which every stage starts and which ``xtuner chat`` reads; with ``--save-format
huggingface`` a plain LLaVA for transformers and servers, with ``gguf`` the files of llama.cpp.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmai_xtuner.cli import add_allow_pickle, add_dtype_argument, exit_status

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    import torch

    from gmai_xtuner.generate import Predictor


def import_model(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    save_format: str = "xtuner",
    max_shard_size: str = "2GB",
    **load: Any,
) -> Predictor:
    """Read a model and write it; all of it or nothing.

    Args:
        folder, load: see :func:`gmai_xtuner.loading.load_model`, but for its ``dtype`` and ``device``.
        out: a new or empty folder.
        dtype: torch's name of the precision that is written.
        save_format: ``xtuner``, ``huggingface`` or ``gguf``.
        max_shard_size: of a file of weights.

    Raises:
        GMAIError: it can't be read, a weight does not fit into fp16, ``max_shard_size`` is no size, or
            ``out`` is not empty. Nothing is written then.
    """
    import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
    from gmai_xtuner.checkpoint.export import check_new, check_shard_size, new_folder
    from gmai_xtuner.checkpoint.export_gguf import write_gguf
    from gmai_xtuner.checkpoint.export_huggingface import Provenance, Source, write_llava
    from gmai_xtuner.loading import AS_STORED, load_model
    from gmai_xtuner.model.internlm2 import as_dtype

    check_new(out)  # before anything is read
    check_shard_size(max_shard_size)
    # Not yet ``dtype``: what does not fit into fp16 would be infinite, or 0, without a word.
    predictor = load_model(folder, dtype=AS_STORED, device="cpu", **load)
    with new_folder(out) as aside:
        if save_format == "xtuner":
            _write_xtuner(predictor, aside, as_dtype(dtype), max_shard_size)
        else:
            write = write_gguf if save_format == "gguf" else write_llava
            name, model = Path(folder).name, predictor.model
            source = Source(
                model.parts,
                model.projector.config.depth,
                predictor.tokenizer,
                predictor.transform,
                predictor.settings,
                Provenance(f"imported from {name}", "not known", name, name),
                as_dtype(dtype),
                max_shard_size,
            )
            write(aside, source)
    return predictor


def _write_xtuner(
    predictor: Predictor, aside: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    from gmai_xtuner.checkpoint.export import convert_dtype, write_xtuner

    parts = predictor.model.parts()
    for part in parts.values():
        convert_dtype(part, dtype)
    write_xtuner(
        aside,
        parts,
        {"llm": predictor.tokenizer, "visual_encoder": predictor.transform.processor()},
        settings=predictor.settings,
        max_shard_size=max_shard_size,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m gmai_xtuner.import_model",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("folder", help="the released model, or an export of xtuner")
    parser.add_argument("out", help="new or empty folder")
    parser.add_argument("--llm", help="the language model's base, where the folder has none")
    parser.add_argument("--vision", help="the vision tower's base, where the folder has none")
    parser.add_argument(
        "--save-format", choices=("xtuner", "huggingface", "gguf"), default="xtuner"
    )
    add_dtype_argument(parser, default="fp16")
    parser.add_argument("--max-shard-size", default="2GB")
    parser.add_argument("--prompt-template", help="name in xtuner's PROMPT_TEMPLATE")
    parser.add_argument("--add-bos", action=argparse.BooleanOptionalAction, default=None)
    add_allow_pickle(parser)
    options = parser.parse_args(arguments)
    from gmai_xtuner.loading import describe
    from gmai_xtuner.model.costs import folder_bytes, size

    def run() -> None:
        predictor = import_model(**vars(options))
        on_disk = size(folder_bytes(Path(options.out)))
        print(f"{describe(predictor)}\n{on_disk} on disk in {options.out}")

    return exit_status(run)


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0

"""Write an InternLM2 or InternLM2.5 base in Llama form, with its tokenizer.

``python -m gmai_xtuner.llama_base internlm/internlm2_5-7b-chat OUT``

Adapters are trained on the Llama form, in which queries, keys and values are separate; the hub's InternLM2.5
has them in one matrix. What this writes is the base for tools that put such an adapter on a base
themselves: ``xtuner convert merge``, ``PeftModel``, servers that load adapters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gmai_xtuner.cli import add_allow_pickle, add_dtype_argument


def write_llama_base(
    base: str, out: str | Path, *, dtype: str | None = None, max_shard_size: str = "4GB"
) -> None:
    """Write a base in Llama form; all of it or nothing.

    ``base`` is an InternLM2, InternLM2.5 or Llama checkpoint, a folder or a hub name, ``out`` a new or empty
    folder; a ``dtype`` of None keeps the base's own.
    """
    # Here, so that --help answers at once.
    import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
    from gmai_xtuner.checkpoint.bases import load_language_model
    from gmai_xtuner.checkpoint.export import new_folder, save_language_model
    from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
    from gmai_xtuner.data.log import info

    with new_folder(out) as aside:
        llm = load_language_model(base, torch_dtype=dtype)
        load_tokenizer(base).save_pretrained(aside)
        save_language_model(llm, aside, {"max_shard_size": max_shard_size})
    info(f"Saved {base} in Llama form to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("base", help="folder or hub name of the InternLM2 base")
    parser.add_argument("out", help="new or empty folder")
    add_dtype_argument(parser, unset="the base's own")
    parser.add_argument("--max-shard-size", default="4GB")
    add_allow_pickle(parser)
    write_llama_base(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()

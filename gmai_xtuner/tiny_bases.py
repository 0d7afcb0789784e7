# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.tiny_bases DIR``: write tiny random base models, by ``examples/tiny_bases.py``."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m gmai_xtuner.tiny_bases",
        description="Write tiny random base models in the hub's layouts: DIR/llm and DIR/vision.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="language model in bfloat16")
    options = parser.parse_args(arguments)
    # After the options, since it imports torch: --help answers at once.
    here = Path(__file__).parent  # a wheel carries the file along, see setup.py
    folder = next(f for f in (here / "examples", here.parent / "examples") if f.is_dir())
    tiny = runpy.run_path(str(folder / "tiny_bases.py"))
    llm = tiny["TinyLLM"](torch_dtype="bfloat16" if options.bfloat16 else "float32")
    tiny["write_tiny_bases"](options.directory, seed=options.seed, llm=llm)
    print(f"wrote {options.directory / 'llm'} and {options.directory / 'vision'}")


if __name__ == "__main__":
    main()

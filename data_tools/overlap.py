# SPDX-License-Identifier: Apache-2.0

"""``python data_tools/overlap.py CORPUS BENCHMARK``: is a benchmark in the training data?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.command import DONE, exit_status, number

LEAKS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: done. 1: an error, said in one message. 3: with ``--check``, something of the exclude list is not left
    out by the mixture, or with ``--strict`` a pair is undecided.
    130: Ctrl-C; the same command goes on with the images that it has not hashed.
    """
    options = _parser().parse_args(arguments)
    return exit_status(partial(_run, options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="overlap.py",
        description="Images and questions that a training corpus shares with a benchmark: a report to look "
        "at, and a list that the mixture's `exclude` takes.",
        epilog="Exit status: 0 done, 1 error, 3 leaks with --check or undecided pairs with --strict, 130 "
        "stopped by Ctrl-C. Hashes are kept: the same command goes on where it was.",
    )
    add = parser.add_argument
    corpus = "corpus folder, mixture file, or records (.json, .jsonl, .parquet)"
    add("corpus", type=Path, help=corpus)
    add("benchmark", type=Path, help="folder, or question file")
    folder = "a folder of its own; default overlap/NAME-OF-BENCHMARK"
    add("--output", type=Path, metavar="DIR", help=folder)
    add("--distance", type=number(int, 0, 16), default=8, metavar="BITS", help="0 to 16; default 8")
    near = "questions are near from here on; 0.5"
    add("--jaccard", type=number(float, 0.001, 1), default=0.5, metavar="J", help=near)
    again: dict[str, Any] = {"action": "append", "default": []}
    add("--only", **again, metavar="PATTERN", help="question files; can be repeated")
    rows = "rows of the question files, such as split=test*; can be repeated"
    add("--where", **again, type=_condition, metavar="COLUMN=PATTERN", help=rows)
    add("--image-root", type=Path, metavar="DIR", help="of records without a mixture")
    images = "where its images are, if not beside it"
    add("--benchmark-images", type=Path, metavar="DIR", help=images)
    add("--cache", type=Path, metavar="FILE", help="of hashes, for all comparisons")
    add("--workers", type=number(int, 1), metavar="N", help="processes; default: all cores")
    check = "exit status 3 if the mixture doesn't leave all of exclude.txt out"
    add("--check", action="store_true", help=check)
    strict = "as --check, and exit status 3 while pairs of near.tsv are undecided"
    add("--strict", action="store_true", help=strict)
    add("--json", action="store_true", help="print the numbers as one JSON object")
    return parser


def _condition(text: str) -> tuple[str, str]:
    column, equals, pattern = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(f"expected COLUMN=PATTERN, got {text!r}")
    return column, pattern


def _run(options: argparse.Namespace) -> int:
    # Not at the top: --help must not wait for them.
    import platformdirs

    from data_tools.command import Bar
    from data_tools.contamination import compare, report
    from data_tools.contamination.benchmark import Benchmark
    from data_tools.contamination.compare import open_corpus
    from data_tools.contamination.hashing import open_cache

    corpus = open_corpus(options.corpus, image_root=options.image_root)
    folder = options.output or report.default_folder(options.benchmark)
    report.check_folder(folder, options.corpus, options.benchmark)
    benchmark = Benchmark(
        options.benchmark,
        image_root=options.benchmark_images,
        only=options.only,
        where=dict(options.where),
    )
    cache_file = options.cache or platformdirs.user_cache_path("gmai_xtuner") / "pictures.sqlite"
    with open_cache(cache_file) as cache:
        with Bar() as bar:
            overlap = compare.run(
                corpus,
                benchmark,
                cache,
                distance=options.distance,
                threshold=options.jaccard,
                workers=options.workers,
                progress=bar,
            )
        numbers = report.write(folder, overlap, cache)
    if options.json:
        print(json.dumps(numbers, ensure_ascii=False), flush=True)
    else:
        print(report.as_text(numbers, folder), flush=True)
    return (
        _check(numbers, folder, strict=options.strict) if options.check or options.strict else DONE
    )


def _check(numbers: dict[str, Any], folder: Path, *, strict: bool) -> int:
    """Say what keeps the mixture from being clean, and return the exit status."""
    fresh, undecided = numbers["exclude"]["not_in_the_mixture_yet"], numbers["undecided"]
    if fresh:
        print(
            f"check: {fresh:,} of {folder / 'exclude.txt'} not left out by the mixture; name it in `exclude`",
            file=sys.stderr,
        )
    if undecided:
        print(
            f"check: {undecided:,} pair{'s' if undecided != 1 else ''} undecided; look at them and write "
            f"exclude or keep into {folder / 'near.tsv'}"
            + ("" if strict else " (--strict fails on them)"),
            file=sys.stderr,
        )
    return LEAKS if fresh or (strict and undecided) else DONE


if __name__ == "__main__":
    sys.exit(main())

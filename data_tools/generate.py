# SPDX-License-Identifier: Apache-2.0

"""``python data_tools/generate.py JOB.yaml``: from labelled medical images to an image-text corpus."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.command import DONE, exit_status, number

STOPPED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: done. 1: an error, said in one message. 3: stopped cleanly before the end, by the budget or because
    batches are under way; the same command goes on. 130: Ctrl-C; the same command goes on.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.job is None) is (options.verify is None):
        parser.error("give either a job file or --verify DIR")
    return exit_status(partial(_run, options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="generate.py",
        description="From labelled medical image sets to an image-text corpus, as a job file says.",
        epilog="Stopped at any moment, the same command goes on where it was. Exit status: 0 done, 1 error, "
        "3 stopped by the budget or waiting for batches, 130 stopped by Ctrl-C.",
    )
    add = parser.add_argument
    add("job", type=Path, nargs="?", metavar="JOB.yaml")
    verb = parser.add_mutually_exclusive_group().add_argument
    dry = "count, estimate the cost and show three examples; asks nothing, writes nothing"
    verb("--dry-run", action="store_true", help=dry)
    held = "without a job: hold a corpus against its manifest; exit status 1 if anything differs"
    verb("--verify", type=Path, metavar="DIR", help=held)
    names = "list source, neutral name and path of each file; for the eyes of who has the data"
    verb("--names", action="store_true", help=names)
    verb("--stats", action="store_true", help="show what the output holds so far")
    page = "write a blinded page, review.html, of about N conversations that people judge"
    verb("--review", type=number(int, 1), metavar="N", help=page)
    hub = (
        "upload the finished corpus to this dataset repository of the hub: publishable, as Parquet"
    )
    verb("--push", metavar="ORG/NAME", help=hub)
    add(
        "--public",
        action="store_true",
        help="with --push: for everybody; a new repository is private",
    )
    saved = "take in what review.html saved; card and report then state the error rate"
    add("--verdicts", type=Path, nargs="+", default=[], metavar="FILE", help=saved)
    add("--limit", type=number(int, 1), metavar="N", help="at most N records of each source")
    only = "this source; can be repeated"
    add("--only", action="append", default=[], metavar="SOURCE", help=only)
    without = "nothing of the annotation goes into a prompt, to measure what annotations are worth"
    add("--without-annotations", action="store_true", help=without)
    add("--output", type=Path, metavar="DIR", help="instead of the job's output")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.verify is not None:
        return _verify(options)
    # Not at the top: --help must not wait for them.
    from data_tools import job as jobs
    from data_tools import overview, pipeline
    from data_tools.command import Bar
    from data_tools.output import push, review, summary

    job = jobs.load(options.job, output=options.output)
    selection = pipeline.Selection(
        limit=options.limit, only=tuple(options.only), grounded=not options.without_annotations
    )
    for verb, look in (("dry_run", overview.dry_run), ("stats", overview.stats)):
        if getattr(options, verb):
            found = look(job, selection)
            _print(found, overview.as_text(found, f"{verb}.j2"), options)
            return DONE
    if options.names:
        listed = list(pipeline.neutral_names(job, selection))
        _print({"names": listed}, "\n".join(map("\t".join, listed)), options)
        return DONE
    if options.review:
        page = pipeline.write_review(job, options.review)
        _print({"review": str(page)}, f"to be judged in a browser: {page}", options)
        return DONE
    if options.push:
        with pipeline.lock(job.output):
            address = push.push(job, options.push, public=options.public)
        _print({"commit": address}, f"uploaded: {address}", options)
        return DONE
    if options.verdicts:
        review.take(job.output, options.verdicts)
    with Bar() as bar:
        result = pipeline.run(job, selection, progress=bar)
    output = job.output.resolve()  # without the `..` of a path relative to the job
    places = f"corpus: {output}\nreport: {output / 'report.html'}"
    _print(result.summary, f"{summary.as_text(result.summary)}\n\n{places}", options)
    if result.stopped is None and not result.pending:
        return DONE
    pending = (
        f"{result.pending} conversations could not be written for faults of the server; the same command "
        "tries them again"
    )
    print(pending if result.stopped is None else f"stopped: {result.stopped}", file=sys.stderr)
    return STOPPED


def _verify(options: argparse.Namespace) -> int:
    from data_tools.output import manifest

    counts, differences = manifest.verify(options.verify)
    found = list(differences)
    told = "; ".join(f"{count:,} {name}" for name, count in counts.items())
    shown = "\n".join(found) or f"{told}: all as the manifest says"
    _print(counts | {"differences": found}, shown, options)
    return 1 if found else DONE


def _print(values: Mapping[str, Any], text: str, options: argparse.Namespace) -> None:
    print(json.dumps(values, ensure_ascii=False) if options.json else text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

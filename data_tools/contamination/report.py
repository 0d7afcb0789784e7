"""The folder that a comparison leaves: ``report.html``, ``report.md``, ``overlap.json``, lists."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.contamination import findings
from data_tools.contamination.compare import Overlap
from data_tools.contamination.findings import ExcludeList, Pair
from data_tools.contamination.folder import MARK, seen_from
from data_tools.contamination.hashing import HashCache, thumbnail
from data_tools.output.report import environment
from gmai_xtuner.core.errors import UnusableImage

PAIRS, QUESTIONS = 120, 60
"""How many the page shows."""

LISTED = 10_000
"""How many `overlap.json` lists of pairs and of questions."""


@dataclass(frozen=True, slots=True)
class Side:
    """One picture of a pair: its name, and itself as a data URL or ""."""

    name: str
    picture: str


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A pair as the page shows it."""

    left: Side
    right: Side
    relation: str
    bits: int | None
    dataset: str
    excluded: str


def write(folder: Path, overlap: Overlap, cache: HashCache) -> dict[str, Any]:
    """Write everything, each file whole or not at all, and return the numbers.

    Args:
        folder: made if need be; decisions in its ``near.tsv`` are read, obeyed and kept.
        overlap: what was found.
        cache: has the pictures that lie in tables.

    Raises:
        CorpusError: the decisions can't be read.
    """
    decisions = findings.read_decisions(folder / "near.tsv")
    listed = findings.pairs(overlap)
    exclude = findings.exclude_list(overlap, listed, decisions)
    numbers = findings.summary(overlap, listed, exclude)
    questions = findings.question_hits(overlap, at_most=LISTED)
    folder.mkdir(parents=True, exist_ok=True)
    title = (
        f"What {overlap.corpus.path.name} shares with {overlap.benchmark.path.name}; "
        "`exclude` of a mixture takes this file. Written by data_tools/overlap.py."
    )
    for side, path in (("corpus", overlap.corpus.path), ("benchmark", overlap.benchmark.path)):
        numbers[side]["seen_from_here"] = seen_from(folder, path)
    whole = {
        **numbers,
        "pairs": [_pair(overlap, pair) for pair in listed[:LISTED]],
        "question_hits": questions,
        "unreadable": overlap.problems,
    }
    _write(folder / MARK, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    _write(folder / "near.tsv", findings.near_table(overlap, listed, decisions))
    _write(folder / "exclude.txt", exclude.text(title=title))
    _write(folder / "report.md", as_markdown(overlap, numbers, listed, questions))
    _write(folder / "report.html", _page(overlap, numbers, listed, questions, exclude, cache))
    return numbers


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _pair(overlap: Overlap, pair: Pair) -> dict[str, Any]:
    image = overlap.images[pair.image]
    return {
        "relation": pair.relation,
        "bits": pair.bits,
        "benchmark_picture": overlap.benchmark.shown[pair.shown].name,
        "dataset": image.dataset,
        "image": image.name,
        "excluded_by_mixture": image.left,
    }


def _page(
    overlap: Overlap,
    numbers: dict[str, Any],
    listed: Sequence[Pair],
    questions: Sequence[dict[str, Any]],
    exclude: ExcludeList,
    cache: HashCache,
) -> str:
    out = {name for _, name in exclude.images}
    shown = []
    for pair in listed[:PAIRS]:
        theirs, image = overlap.benchmark.shown[pair.shown], overlap.images[pair.image]
        small = cache.small(theirs.key) if theirs.key else _small(theirs.path)
        left = "excluded by the mixture" if image.left else ""
        shown.append(
            ShownPair(
                Side(theirs.name, _url(small)),
                Side(image.name, _url(_small(image.path))),
                pair.relation,
                pair.bits,
                image.dataset if overlap.corpus.is_mixture else "",
                left or ("in exclude.txt" if image.name in out else ""),
            )
        )
    return (
        environment()
        .get_template("contamination/report.html.j2")
        .render(
            corpus=overlap.corpus.path.name,
            benchmark=overlap.benchmark.path.name,
            summary=numbers,
            pairs=shown,
            more_pairs=len(listed) - len(shown),
            questions=questions[:QUESTIONS],
            more_questions=max(0, len(questions) - QUESTIONS),
        )
    )


def _small(path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return thumbnail(path)
    except UnusableImage:
        return b""  # it was readable when it was hashed; the page says that it can't be shown


def _url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode() if data else ""


# --- texts --------------------------------------------------------------------------------------


def as_text(numbers: dict[str, Any], folder: Path) -> str:
    """The result for a terminal."""
    corpus, benchmark = numbers["corpus"], numbers["benchmark"]
    pictures, questions, items = numbers["pictures"], numbers["questions"], numbers["items"]
    lines = [
        f"corpus     {corpus['conversations']:,} conversations, "
        f"{corpus['distinct_pictures']:,} distinct pictures "
        f"({corpus['taken_for']}, {len(corpus['datasets'])} dataset(s))",
        f"benchmark  {benchmark['questions']:,} questions, {benchmark['pictures']:,} pictures "
        f"({len(benchmark['files'])} file(s))",
        "",
    ]
    if pictures["compared"]:
        near = ", ".join(
            f"{count:,} within {bits}" for bits, count in pictures["within_bits"].items()
        )
        lines += [
            f"pictures   {pictures['same_pixels']:,} of the benchmark's are in the corpus pixel by pixel",
            f"           hashes: {near} bits; {pictures['same_case']:,} bear a case's name of the corpus",
        ]
    else:
        lines.append(f"pictures   NOT COMPARED: {pictures['not_compared_because']}")
    if questions["compared"]:
        lines += [
            f"questions  {questions['equal']:,} of {questions['texts']:,} texts are asked word for word, "
            f"{questions['near']:,} nearly (Jaccard {questions['jaccard']:g})",
            f"items      {items['picture_and_question']:,} picture and question, {items['picture']:,} "
            f"picture only, {items['question']:,} question only, {items['neither']:,} neither",
        ]
    else:
        lines.append("questions  NOT COMPARED")
    exclude = numbers["exclude"]
    lines += [
        f"exclude    {exclude['images']:,} images and {exclude['conversations']:,} conversations; "
        f"{exclude['not_in_the_mixture_yet']:,} of them not yet left out by the mixture",
        f"to look at {numbers['to_look_at']:,} pairs, {numbers['undecided']:,} of them undecided",
    ]
    lines += [f"warning: {text}" for text in numbers["warnings"]]
    lines += [
        "",
        f"{folder / 'report.html'} to look at, {folder / 'exclude.txt'} for `exclude` of the mixture",
    ]
    return "\n".join(lines)


def as_markdown(
    overlap: Overlap,
    numbers: dict[str, Any],
    listed: Sequence[Pair],
    questions: Sequence[dict[str, Any]],
) -> str:
    """``report.md``: the numbers and the first of the hits."""
    pictures, items = numbers["pictures"], numbers["items"]
    lines = [
        f"# Overlap of {_cell(overlap.corpus.path.name)} with {_cell(overlap.benchmark.path.name)}",
        "",
        "| | |",
        "|---|---|",
        f"| conversations of the corpus | {numbers['corpus']['conversations']:,} |",
        f"| distinct pictures of the corpus | {numbers['corpus']['distinct_pictures']:,} |",
        f"| questions of the benchmark | {numbers['benchmark']['questions']:,} |",
        f"| pictures of the benchmark | {numbers['benchmark']['pictures']:,} |",
    ]
    if pictures["compared"]:
        lines.append(f"| **same pixels** | {pictures['same_pixels']:,} |")
        lines += [
            f"| perceptual hash within {bits} bits | {count:,} |"
            for bits, count in pictures["within_bits"].items()
        ]
        lines.append(f"| same case by name | {pictures['same_case']:,} |")
    else:
        lines.append(f"| pictures | **not compared**: {_cell(pictures['not_compared_because'])} |")
    if numbers["questions"]["compared"]:
        lines += [
            f"| questions word for word | {numbers['questions']['equal']:,} |",
            f"| questions nearly | {numbers['questions']['near']:,} |",
            *(f"| items: {name.replace('_', ' ')} | {items[name]:,} |" for name in items),
        ]
    else:
        lines.append("| questions | **not compared** |")
    names = numbers["exclude"]["images"] + numbers["exclude"]["conversations"]
    lines.append(f"| names in exclude.txt | {names:,} |")
    if numbers["warnings"]:
        lines += ["", *(f"- {_cell(text)}" for text in numbers["warnings"])]
    if listed:
        lines += [
            "",
            "## Pictures",
            "",
            "| relation | bits | benchmark | corpus |",
            "|---|---|---|---|",
        ]
        for pair in listed[:PAIRS]:
            told = _pair(overlap, pair)
            bits = "" if pair.bits is None else pair.bits
            lines.append(
                f"| {told['relation']} | {bits} | {_cell(told['benchmark_picture'])} | "
                f"{_cell(told['dataset'])}: {_cell(told['image'])} |"
            )
    if questions:
        lines += [
            "",
            "## Questions",
            "",
            "| question | equal | near | same picture |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {_cell(hit['question'][:200])} | {hit['equal']:,} | {hit['near']:,} | "
            f"{'yes' if hit['examples'][0]['same_picture'] else ''} |"
            for hit in questions[:QUESTIONS]
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

# SPDX-License-Identifier: Apache-2.0

"""The folder that a comparison leaves: ``report.html``, ``report.md``, ``overlap.json``, lists.

Each comparison has a folder of its own, so that no list of another benchmark is written over.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.contamination import findings
from data_tools.contamination.compare import Overlap
from data_tools.contamination.findings import ExcludeList, Pair
from data_tools.contamination.hashing import HashCache, thumbnail
from data_tools.output import templates
from gmai_xtuner.core.errors import CorpusError, Unusable
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.templates import environment

MARK = "overlap.json"
"""Written first of all files: a folder with it is a comparison's."""

PAIRS, QUESTIONS = 120, 60
"""Pairs and questions that the page shows."""

LISTED = 10_000
"""Pairs, and questions, that `overlap.json` lists."""


def default_folder(benchmark: Path) -> Path:
    """Return ``overlap/<name of the benchmark's folder or file>``, below the working directory."""
    path = benchmark.resolve()
    return Path("overlap") / (path.name if path.is_dir() else path.stem)


def seen_from(folder: Path, path: Path) -> str:
    """Return a path as the folder sees it: the same wherever the command is called and when both move."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_folder(folder: Path, corpus: Path, benchmark: Path) -> None:
    """Refuse a folder, which need not exist, that another comparison or something else has its files in.

    A `CorpusError` for no folder, a folder of something else, or of another corpus or benchmark.
    """
    remedy = "Give another folder with --output."
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CorpusError(f"--output {folder} is a file; a folder was expected. {remedy}")
    mark = folder / MARK
    if not mark.is_file():
        # near.tsv alone: decisions that were carried over. Hidden: of a run that was killed.
        names = sorted({path.name for path in folder.iterdir()} - {"near.tsv"})
        others = [name for name in names if not name.startswith(".")]
        if others:
            told = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise CorpusError(
                f"--output {folder} is not empty and no folder of a comparison ({told}). {remedy}"
            )
        return
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        for side, now in (("corpus", corpus), ("benchmark", benchmark)):
            before = Path(found[side]["path"])
            seen = found[side].get("seen_from_here")
            if seen != seen_from(folder, now) and before.resolve() != now.resolve():
                raise CorpusError(
                    f"--output {folder} holds the comparison with another {side}: {before}, now {now}. Its "
                    f"exclude.txt and near.tsv would be lost. {remedy} A mixture's `exclude` takes a list of "
                    "files."
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"--output {folder}: its {MARK} is not of this command ({type(error).__name__}: {error}). "
            f"{remedy}"
        ) from error


def write(folder: Path, overlap: Overlap, cache: HashCache) -> dict[str, Any]:
    """Write the whole folder, each file whole or not at all, and return the numbers.

    Decisions in its ``near.tsv`` are read, obeyed and kept. A `CorpusError` if the decisions can't be read.
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
        "pairs": [
            {
                "relation": pair.relation,
                "bits": pair.bits,
                **dict(zip(("benchmark_picture", "dataset", "image"), pair.key, strict=True)),
                "excluded_by_mixture": pair.ours.is_excluded,
            }
            for pair in listed[:LISTED]
        ],
        "question_hits": questions,
        "unreadable": overlap.problems,
    }
    markdown = _rendered(
        "report.md.j2",
        corpus=overlap.corpus.path.name,
        benchmark=overlap.benchmark.path.name,
        n=numbers,
        pairs=whole["pairs"][:PAIRS],
        questions=questions[:QUESTIONS],
    )
    for name, text in (
        (MARK, json.dumps(whole, ensure_ascii=False, indent=1) + "\n"),
        ("near.tsv", findings.near_table(overlap, listed, decisions)),
        ("exclude.txt", exclude.text(title=title)),
        ("report.md", markdown),
        ("report.html", _page(overlap, numbers, listed, questions, exclude, cache)),
    ):
        replace_text(folder / name, text.encode("utf-8", "backslashreplace"))
    return numbers


def _page(
    overlap: Overlap,
    numbers: dict[str, Any],
    listed: Sequence[Pair],
    questions: Sequence[dict[str, Any]],
    exclude: ExcludeList,
    cache: HashCache,
) -> str:
    excluded = {name for _, name in exclude.images}
    shown = []
    for pair in listed[:PAIRS]:
        theirs, ours = overlap.benchmark.images[pair.theirs], pair.ours
        small = cache.small(theirs.key) if theirs.key else _small(theirs.path)
        now = "in exclude.txt" if ours.name in excluded else ""
        shown.append(
            {
                "relation": pair.relation,
                "bits": pair.bits,
                "sides": [(theirs.name, _url(small)), (ours.name, _url(_small(ours.path)))],
                "dataset": ours.dataset if overlap.corpus.is_mixture else "",
                "excluded": "excluded by the mixture" if ours.is_excluded else now,
            }
        )
    template = templates(html=True).get_template("contamination/report.html.j2")
    return template.render(
        corpus=overlap.corpus.path.name,
        benchmark=overlap.benchmark.path.name,
        summary=numbers,
        pairs=shown,
        more_pairs=len(listed) - len(shown),
        questions=questions[:QUESTIONS],
        more_questions=max(0, len(questions) - QUESTIONS),
    )


def _small(path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return thumbnail(path)
    except Unusable:
        return b""  # it was readable when it was hashed; the page says that it can't be shown


def _url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode() if data else ""


def as_text(numbers: dict[str, Any], folder: Path) -> str:
    """Return the result for a terminal."""
    return _rendered("report.txt.j2", n=numbers, folder=folder).rstrip("\n")


def _rendered(template: str, **values: Any) -> str:
    """Fill in a template of plain text; ``cell`` keeps a text on its line and out of a table's markup."""
    plain = environment("data_tools.contamination", keep_trailing_newline=True)
    plain.filters["cell"] = _cell
    return plain.get_template(template).render(values)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else value
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

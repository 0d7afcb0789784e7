# SPDX-License-Identifier: Apache-2.0

"""A preflight as one JSON object, or as a page for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

from gmai_xtuner.core.templates import environment
from gmai_xtuner.preflight.memory import ALLOWANCE, GIB
from gmai_xtuner.preflight.survey import SKIP, Preflight

IN_JSON = 10_000
"""Entries of one list in JSON; how many are left out is said beside it."""
IN_TEXT = 20
WIDTH = 110

VERDICT = {True: "would fail", False: "would run"}


def as_json(result: Preflight) -> dict[str, Any]:
    """Return all that was found, in plain types; see ``docs/preflight.md`` for the keys."""
    run, data, memory, parts = result.run, result.summary, result.memory, result.counts or {}
    images, images_left_out = _shorten(result.missing_images(), IN_JSON)
    bad_images, bad_left_out = _shorten(result.bad_images, IN_JSON)
    whole = {
        "epochs": data and data.epochs,
        "iterations": data and data.iterations,
        "optimizer_steps": data and data.steps,
        "packs_per_step": data and data.packs_per_step,
        "hours": result.hours,
    }
    per_pack = data and {
        "mean": round(data.images_per_pack_mean, 3),
        "max": data.images_per_pack_max,
    }
    zero = {"name": run.zero.name, "stage": run.zero.stage, "precision": run.zero.precision}
    of_an_epoch = ("conversations", "images", "tokens", "learnt_tokens", "packs")
    return {
        "verdict": VERDICT[result.findings.would_fail],
        "config": str(run.path),
        "gpus": run.gpus,
        "deepspeed": zero,
        "parameters": _with_total({name: part.total for name, part in parts.items()}),
        "trainable": _with_total({name: part.trainable for name, part in parts.items()}),
        **{name: getattr(data, name, None) for name in of_an_epoch},
        "fill": data and round(data.fill, 4),
        "images_per_pack": per_pack,
        "iterations": data and data.iterations_per_epoch,
        "optimizer_steps": data and data.steps_per_epoch,
        "run": data and whole,
        "datasets": data and [asdict(row) for row in data.datasets],
        "missing": {
            "datasets": [asdict(dataset) for dataset in result.survey.missing],
            "images": [{"dataset": dataset, "image": image} for dataset, image in images],
            "images_left_out": images_left_out,
        },
        "bad_records": [_bad_records(bad) for bad in result.survey.bad.values()],
        "images_decoded": result.decoded,
        "bad_images": [asdict(image) for image in bad_images],
        "bad_images_left_out": bad_left_out,
        "memory_gib": memory and memory.in_gib(),
        "highest_moment": memory and memory.moment,
        "gpu_memory_gib": result.gpu_memory,
        "disk": result.disk,
        "problems": [asdict(finding) for finding in result.findings.found],
    }


def _with_total(parts: dict[str, int]) -> dict[str, int] | None:
    return {**parts, "total": sum(parts.values())} if parts else None


def _bad_records(bad: Any) -> dict[str, Any]:
    records, left_out = _shorten(bad.notes(), IN_JSON)
    return {
        "dataset": bad.name,
        "count": bad.count,
        "reasons": bad.reasons,
        "stops_training": bad.refused,
        "listing": str(bad.listing),
        "records": records,
        "records_left_out": left_out,
    }


def _shorten(items: Iterable[Any], limit: int) -> tuple[list[Any], int]:
    """The first items, and how many there are beyond them."""
    rest = iter(items)
    first = list(islice(rest, limit))
    return first, sum(1 for _ in rest)


def as_text(result: Preflight) -> str:
    """Return the page; it ends with the verdict."""
    kinds = ("records", "bad", "too_long", "cut", "held_out", "neither", "excluded")
    rows = result.summary.datasets if result.summary else []
    templates = environment("gmai_xtuner.preflight")
    shorten = partial(textwrap.shorten, width=40, placeholder="...")
    templates.filters |= {"table": _table, "wrap": _wrap, "shorten": shorten}
    text = templates.get_template("report.txt.j2").render(
        result=result,
        # What concerns no dataset of this mixture only takes room.
        columns=[k for k in kinds if k == "records" or any(getattr(row, k) for row in rows)],
        remedies=_remedies(result),
        n="{:,}".format,
        gib=lambda number, digits=2: f"{number / GIB:.{digits}f}",
        allowance=ALLOWANCE,
        most=IN_TEXT,
        first=_shorten,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _table(text: str, align: str = "<><") -> str:
    """Align lines of cells; the last sign of ``align`` holds for all columns behind it, too."""
    lines = text.strip("\n").split("\n")
    rows = [[cell.strip() for cell in line.split("¦", lines[0].count("¦"))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align.ljust(len(widths), align[-1])
    texts = ("  ".join(map("{:{}{}}".format, row, signs, widths)) for row in rows)
    return "".join(f"  {one}".rstrip() + "\n" for one in texts)


def _wrap(text: str) -> str:
    wrapper = textwrap.TextWrapper(WIDTH, "  ", "    ", break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.fill(" ".join(text.split()))


def _remedies(result: Preflight) -> list[str]:
    """Return the first of what can be done about bad records, and the last, to leave them out."""
    found: dict[str, None] = {}
    for bad in result.survey.bad.values():
        remedies = (note["remedy"] for note in islice(bad.notes(), IN_JSON))
        found |= dict.fromkeys(" ".join(text.split()).rstrip(".") for text in remedies if text)
    if any(bad.refused for bad in result.survey.bad.values()):
        found[f"Or leave them out of the training: {SKIP}"] = None
    return list(found)[: IN_TEXT - 1] + list(found)[IN_TEXT - 1 :][-1:]

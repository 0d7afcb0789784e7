# SPDX-License-Identifier: Apache-2.0

"""A preflight as one JSON object, or as a page for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from gmai_xtuner.preflight.memory import ALLOWANCE, GIB
from gmai_xtuner.preflight.run_config import FAIL, NOTE, WARN
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
    activations = memory and {
        "kept_gib": round(memory.activations.kept / GIB, 3),
        "peak_gib": round(memory.activations.peak / GIB, 3),
        "highest_moment": memory.activations.moment,
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
        "activations": activations,
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
    sections = (_head, _parameters, _data, _run, _memory, _missing, _problems, _verdict)
    texts = ("\n".join(section(result)).strip("\n") for section in sections)
    return "\n\n".join(text for text in texts if text) + "\n"


def _head(result: Preflight) -> list[str]:
    run = result.run
    gpus = "1 GPU" if run.gpus == 1 else f"{run.gpus} GPUs"
    micro_batch = "1 pack" if run.batch_size == 1 else f"{run.batch_size} packs"
    return [
        f"{run.path}",
        f"{gpus}, --deepspeed {run.zero.name} (ZeRO-{run.zero.stage}, {run.zero.precision}); "
        f"{micro_batch} of {run.max_length} tokens a micro-batch, {run.accumulation} micro-batches a step",
    ]


def _table(rows: Sequence[Sequence[str]], align: str = "<><") -> list[str]:
    """Return rows as aligned lines; the last sign of ``align`` holds for all columns behind it, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align.ljust(len(widths), align[-1])
    return [("  " + "  ".join(map("{:{}{}}".format, row, signs, widths))).rstrip() for row in rows]


def _parameters(result: Preflight) -> list[str]:
    if result.counts is None:
        return ["Model: could not be built"]
    rows = [(name, part.total, part.trainable) for name, part in result.counts.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    texts = [(name, f"{total:,}", f"{trainable:,}") for name, total, trainable in rows]
    return ["Model", *_table([("", "parameters", "trainable"), *texts], "<>")]


def _data(result: Preflight) -> list[str]:
    data = result.summary
    if data is None:
        return ["Data: could not be planned"]
    # What concerns no dataset of this mixture only takes room.
    names = [
        name
        for name in ("records", "bad", "too_long", "cut", "held_out", "neither", "excluded")
        if name == "records" or any(getattr(row, name) for row in data.datasets)
    ]
    titles = [name.replace("_", " ") for name in names]
    rows = [["", *titles, "ratio", "conversations", "images", "tokens"]]
    for row in data.datasets:
        name = textwrap.shorten(row.name, 40, placeholder="...")
        counted = [f"{getattr(row, name):,}" for name in names]
        counts = (row.conversations, row.images, row.tokens)
        rows.append([name, *counted, f"{row.ratio:g}", *(f"{n:,}" for n in counts)])
    totals = (f"{number:,}" for number in (data.conversations, data.images, data.tokens))
    rows.append(["an epoch", *[""] * (len(names) + 1), *totals])
    most = f"on average, {data.images_per_pack_max} at the most"
    share = f"{data.learnt_tokens / data.tokens:.1%} of all"
    facts = [
        ("packs", f"{data.packs:,}", f"{data.fill:.1%} full"),
        ("images a pack", f"{data.images_per_pack_mean:.2f}", most),
        ("learnt tokens", f"{data.learnt_tokens:,}", share),
    ]
    if built := result.survey.built:
        names_built = ", ".join(built[:5]) + (", ..." if len(built) > 5 else "")
        facts.append(
            ("token caches built", str(len(built)), f"training starts with them: {names_built}")
        )
    return ["Data", *_table(rows, "<>"), "", *_table(facts)]


def _run(result: Preflight) -> list[str]:
    data, disk = result.summary, result.disk
    if data is None:
        return []
    of_a_step = f"an epoch, {data.packs_per_step} packs each"
    rows = [
        ("iterations", f"{data.iterations_per_epoch:,}", "an epoch: micro-batches on each GPU"),
        ("optimiser steps", f"{data.steps_per_epoch:,}", of_a_step),
    ]
    if abs(data.epochs - 1) > 1e-9:
        in_all = f"{data.iterations:,} iterations, {data.steps:,} steps in all"
        rows.append(("epochs", f"{data.epochs:g}", in_all))
    if result.hours is not None:
        speed = f"at {result.throughput:g} tokens a second on each GPU"
        rows.append(("hours", f"{result.hours:,.1f}", speed))
    if disk:
        place = f"GiB, {disk['at_a_time']} at a time in {result.run.work_dir}"
        free = f"({disk['free_gib']:,.0f} GiB free)"
        rows.append(("checkpoint", f"{disk['checkpoint_gib']:.1f}", f"{place} {free}"))
    return ["Run", *_table(rows)]


def _memory(result: Preflight) -> list[str]:
    memory = result.memory
    if memory is None:
        return []
    activations = memory.activations
    temporaries = "its temporaries; activations and buffers are free then"
    on_the_way = "a micro-batch's, on the way to the sum; activations are free then"
    at_the_moment = {
        "optimiser step": [("optimiser step", memory.step, temporaries)],
        "gradient sum": [
            ("DeepSpeed's buffers", memory.buffers, "buckets"),
            ("gradient sum", memory.summing, on_the_way),
        ],
        activations.moment: [
            ("DeepSpeed's buffers", memory.buffers, "buckets, gathered weights"),
            ("activations, kept", activations.kept, "from the forward to the backward pass"),
            ("activations, peak", activations.peak, f"highest moment: {activations.moment}"),
        ],
    }
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimiser", memory.optimizer, "fp32 weights and moments"),
        *at_the_moment[memory.moment],
        ("allowance", ALLOWANCE, "CUDA context, NCCL, fragments"),
        ("total", memory.total, f"of {result.gpu_memory:g} GiB"),
    ]
    lines = _table([[name, f"{number / GIB:.2f}", told] for name, number, told in rows])
    if memory.host:
        lines.append(f"  and {memory.host / GIB:.1f} GiB of host memory for each GPU")
    return ["Memory of one GPU, GiB (an estimate)", *lines]


def _missing(result: Preflight) -> list[str]:
    lines: list[str] = []
    if datasets := result.survey.missing:
        lines.append(f"Missing datasets: {len(datasets)}")
        rows = [
            (one.name, one.paths[0] + f" and {len(one.paths) - 1} more" * (len(one.paths) > 1))
            for one in datasets
        ]
        lines += [*_table(rows[:IN_TEXT], "<"), *_and_more(len(datasets) - IN_TEXT)]
    remedies: dict[str, None] = {}
    for bad in result.survey.bad.values():
        word = "Bad records" if bad.refused else "Records left out"
        lines += ["", f"{word} of {bad.name}: {bad.count}, listed in {bad.listing}"]
        notes, left_out = _shorten(bad.notes(), IN_TEXT)
        lines += [
            f"  {note['where'] or 'the file'}: {note['problem']} ({note['reason']})"
            for note in notes
        ]
        lines += _and_more(left_out)
        told_of = (note["remedy"] for note in islice(bad.notes(), IN_JSON))
        remedies |= dict.fromkeys(" ".join(text.split()).rstrip(".") for text in told_of if text)
    if any(bad.refused for bad in result.survey.bad.values()):
        remedies[f"Or leave them out of the training: {SKIP}"] = None
    if remedies:
        lines += ["", "What to do about bad records"]
        for text in list(remedies)[: IN_TEXT - 1] + list(remedies)[IN_TEXT - 1 :][-1:]:
            lines += _wrap(text)
    if result.bad_images:
        lines += ["", f"Bad images: {len(result.bad_images)}"]
        lines += [
            # Without the path that stands before what is wrong.
            f"  {image.dataset}  {image.image}: {image.problem.rpartition(chr(39) + ' ')[2]}"
            for image in result.bad_images[:IN_TEXT]
        ]
        lines += _and_more(len(result.bad_images) - IN_TEXT)
    return lines


def _and_more(number: int) -> list[str]:
    return [f"  ... and {number} more (all in --json)"] if number > 0 else []


def _problems(result: Preflight) -> list[str]:
    lines: list[str] = []
    for level, word in ((FAIL, "Would fail"), (WARN, "Look at"), (NOTE, "Note")):
        if found := result.findings.of(level):
            lines += ["", word]
        for finding in found:
            lines += _wrap(f"{finding.about}: {' '.join(finding.text.split())}")
    return lines


def _wrap(text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, "  ", "    ", break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.wrap(text)


def _verdict(result: Preflight) -> list[str]:
    fails, warnings = result.findings.of(FAIL), result.findings.of(WARN)
    if fails:
        about = dict.fromkeys(finding.about for finding in fails)
        return [f"Verdict: this run would fail ({', '.join(about)})."]
    if warnings:
        things = "one thing" if len(warnings) == 1 else f"{len(warnings)} things"
        return [f"Verdict: this run would start, with {things} to look at."]
    images = "images are there (--images decodes them)"
    checked = "every image was decoded" if result.decoded else images
    return [f"Verdict: nothing was found that would stop this run; {checked}."]

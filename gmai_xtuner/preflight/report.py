# SPDX-License-Identifier: Apache-2.0

"""A preflight as one JSON object, or as a page for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from gmai_xtuner.preflight.findings import FAIL, NOTE, WARN
from gmai_xtuner.preflight.memory import GIB
from gmai_xtuner.preflight.survey import SKIP, Preflight

IN_JSON = 10_000
"""Entries of one list in JSON; how many are left out is said beside it."""
IN_TEXT = 20
WIDTH = 110

VERDICT = {True: "would fail", False: "would run"}


# --- JSON -----------------------------------------------------------------------------------------


def as_json(result: Preflight) -> dict[str, Any]:
    """All that was found, in plain types; see ``docs/preflight.md`` for the keys."""
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


# --- text -----------------------------------------------------------------------------------------


def as_text(result: Preflight) -> str:
    """The page; it ends with the verdict."""
    sections = [
        _head(result),
        _parameters(result),
        _data(result),
        _run(result),
        _memory(result),
        _missing(result),
        _problems(result),
        _verdict(result),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(result: Preflight) -> str:
    run = result.run
    gpus = "1 GPU" if run.gpus == 1 else f"{run.gpus} GPUs"
    micro_batch = "1 pack" if run.batch_size == 1 else f"{run.batch_size} packs"
    return (
        f"{run.path}\n"
        f"{gpus}, --deepspeed {run.zero.name} (ZeRO-{run.zero.stage}, {run.zero.precision}); "
        f"{micro_batch} of {run.max_length} tokens a micro-batch, {run.accumulation} micro-batches a step"
    )


def _table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows as aligned lines; the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _parameters(result: Preflight) -> str:
    if result.counts is None:
        return "Model: could not be built"
    rows = [["", "parameters", "trainable"]]
    for name, part in result.counts.items():
        rows.append([name, f"{part.total:,}", f"{part.trainable:,}"])
    total = sum(part.total for part in result.counts.values())
    trainable = sum(part.trainable for part in result.counts.values())
    rows.append(["total", f"{total:,}", f"{trainable:,}"])
    return "\n".join(["Model", *_table(rows)])


def _data(result: Preflight) -> str:
    data = result.summary
    if data is None:
        return "Data: could not be planned"
    names = ("records", "bad", "too long", "cut", "held out", "neither", "excluded")
    # What concerns no dataset of this mixture only takes room.
    columns = {
        name: values
        for name in names
        if any(values := [getattr(row, name.replace(" ", "_")) for row in data.datasets])
        or name == "records"
    }
    rows = [["", *columns, "ratio", "conversations", "images", "tokens"]]
    for number, row in enumerate(data.datasets):
        name = textwrap.shorten(row.name, 40, placeholder="...")
        counts = (row.conversations, row.images, row.tokens)
        counted = [f"{column[number]:,}" for column in columns.values()]
        rows.append([name, *counted, f"{row.ratio:g}", *(f"{n:,}" for n in counts)])
    totals = (f"{number:,}" for number in (data.conversations, data.images, data.tokens))
    rows.append(["an epoch", *[""] * (len(columns) + 1), *totals])
    most = f"on average, {data.images_per_pack_max} at the most"
    share = f"{data.learnt_tokens / data.tokens:.1%} of all"
    facts = [
        ("packs", f"{data.packs:,}", f"{data.fill:.1%} full"),
        ("images a pack", f"{data.images_per_pack_mean:.2f}", most),
        ("learnt tokens", f"{data.learnt_tokens:,}", share),
    ]
    if built := result.survey.built:
        told = ", ".join(built[:5]) + (", ..." if len(built) > 5 else "")
        facts.append(("token caches built", str(len(built)), f"training starts with them: {told}"))
    return "\n".join(["Data", *_table(rows), "", *_facts(facts)])


def _facts(rows: Sequence[Sequence[str]]) -> list[str]:
    names = max(len(row[0]) for row in rows)
    numbers = max(len(row[1]) for row in rows)
    return [f"  {row[0]:<{names}}  {row[1]:>{numbers}}  {row[2]}".rstrip() for row in rows]


def _run(result: Preflight) -> str:
    data, disk = result.summary, result.disk
    if data is None:
        return ""
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
        told = f"GiB, {disk['at_a_time']} at a time in {result.run.work_dir}"
        free = f"({disk['free_gib']:,.0f} GiB free)"
        rows.append(("checkpoint", f"{disk['checkpoint_gib']:.1f}", f"{told} {free}"))
    return "\n".join(["Run", *_facts(rows)])


def _memory(result: Preflight) -> str:
    memory = result.memory
    if memory is None:
        return ""
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimiser", memory.optimizer, "fp32 weights and moments"),
    ]
    activations = memory.activations
    if memory.moment == "optimiser step":
        told = "its temporaries; activations and buffers are free then"
        rows.append(("optimiser step", memory.step, told))
    elif memory.moment == "gradient sum":
        told = "a micro-batch's, on the way to the sum; activations are free then"
        rows += [
            ("DeepSpeed's buffers", memory.buffers, "buckets"),
            ("gradient sum", memory.summing, told),
        ]
    else:
        rows += [
            ("DeepSpeed's buffers", memory.buffers, "buckets, gathered weights"),
            ("activations, kept", activations.kept, "from the forward to the backward pass"),
            ("activations, peak", activations.peak, f"highest moment: {activations.moment}"),
        ]
    rows += [
        ("allowance", memory.allowance, "CUDA context, NCCL, fragments"),
        ("total", memory.total, f"of {result.gpu_memory:g} GiB"),
    ]
    facts = [[name, f"{number / GIB:.2f}", told] for name, number, told in rows]
    lines = _facts(facts)
    if memory.host:
        lines.append(f"  and {memory.host / GIB:.1f} GiB of host memory for each GPU")
    return "\n".join(["Memory of one GPU, GiB (an estimate)", *lines])


def _missing(result: Preflight) -> str:
    lines: list[str] = []
    datasets = result.survey.missing
    if datasets:
        lines.append(f"Missing datasets: {len(datasets)}")
        width = max(len(dataset.name) for dataset in datasets[:IN_TEXT])
        for dataset in datasets[:IN_TEXT]:
            more = f" and {len(dataset.paths) - 1} more" if len(dataset.paths) > 1 else ""
            lines.append(f"  {dataset.name:<{width}}  {dataset.paths[0]}{more}")
        lines += _and_more(len(datasets) - IN_TEXT)
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
        told = (note["remedy"] for note in islice(bad.notes(), IN_JSON))
        remedies |= dict.fromkeys(" ".join(text.split()).rstrip(".") for text in told if text)
    if any(bad.refused for bad in result.survey.bad.values()):
        remedies[f"Or leave them out of the training: {SKIP}"] = None
    if remedies:
        lines += ["", "What to do about bad records"]
        for text in list(remedies)[: IN_TEXT - 1] + list(remedies)[IN_TEXT - 1 :][-1:]:
            lines += _wrap(text)
    if result.bad_images:
        lines += ["", f"Bad images: {len(result.bad_images)}"]
        lines += [
            f"  {image.dataset}  {image.image}: {_after_path(image.problem)}"
            for image in result.bad_images[:IN_TEXT]
        ]
        lines += _and_more(len(result.bad_images) - IN_TEXT)
    return "\n".join(lines).strip()


def _after_path(problem: str) -> str:
    """What is wrong, without the path that stands before it."""
    return problem.rpartition("' ")[2] or problem


def _and_more(number: int) -> list[str]:
    return [f"  ... and {number} more (all in --json)"] if number > 0 else []


def _problems(result: Preflight) -> str:
    lines: list[str] = []
    for level, word in ((FAIL, "Would fail"), (WARN, "Look at"), (NOTE, "Note")):
        found = result.findings.of(level)
        if not found:
            continue
        lines += ["", word]
        for finding in found:
            lines += _wrap(f"{finding.about}: {' '.join(finding.text.split())}")
    return "\n".join(lines).strip()


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _verdict(result: Preflight) -> str:
    fails, warnings = result.findings.of(FAIL), result.findings.of(WARN)
    if fails:
        about = list(dict.fromkeys(finding.about for finding in fails))
        return f"Verdict: this run would fail ({', '.join(about)})."
    if warnings:
        things = "one thing" if len(warnings) == 1 else f"{len(warnings)} things"
        return f"Verdict: this run would start, with {things} to look at."
    checked = (
        "every image was decoded" if result.decoded else "images are there (--images decodes them)"
    )
    return f"Verdict: nothing was found that would stop this run; {checked}."

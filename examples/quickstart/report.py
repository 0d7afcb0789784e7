# SPDX-License-Identifier: Apache-2.0

"""The quickstart's result as a table, ``report.json`` and ``answers.png``.

    python examples/quickstart/report.py work_dirs/quickstart

Reads what `run.py` left there: each stage's mmengine log, ``timings.json``, ``predictions.jsonl``.

``loss_first`` and ``loss_last`` are means over the first and the last `LOSS_ENTRIES` logged values
of a stage; a logged value is itself mmengine's mean over its last iterations. An answer is right if
it is the expected one but for case, outer blanks and a closing full stop. ``chance`` is the best
score of whoever sees the questions without the images: each question's most frequent answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = {
    "stage1_shallow": "stage1",
    "stage2_deep": "stage2",
    "stage3_instruct": "stage3",
}
LOSS_ENTRIES = 3
PICTURE_COLUMNS = 6
EXAMPLES = 6


class ReportError(ValueError):
    """A stage's log or the predictions are missing or say nothing."""


def read_losses(work_dir: Path) -> list[tuple[int, float]]:
    """Iteration and loss of every logged step of a stage, in order; of a resumed run, all parts."""
    losses: dict[int, float] = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                losses[int(entry.get("iter", entry["step"]))] = float(entry["loss"])
    if not losses:
        raise ReportError(
            f"no loss is logged in {work_dir}/*/vis_data/scalars.json: the stage did not train; "
            f"see {work_dir}/train_*.log"
        )
    return sorted(losses.items())


def iterations_done(work_dir: Path, *, logged: int) -> int:
    """Iterations by the name of the last checkpoint, ``iter_<n>.pth``, else those ``logged``."""
    pointer = work_dir / "last_checkpoint"
    name = Path(pointer.read_text(encoding="utf-8").strip()).name if pointer.is_file() else ""
    match = re.fullmatch(r"iter_(\d+)(\.pth)?", name)
    return int(match.group(1)) if match else logged


def summarize_stage(work_dir: Path, *, seconds: float) -> dict[str, Any]:
    """A stage's entry of the report; with few logged values first and last don't overlap."""
    losses = read_losses(work_dir)
    count = max(1, min(LOSS_ENTRIES, len(losses) // 2))
    values = [loss for _, loss in losses]
    return {
        "loss_first": round(sum(values[:count]) / count, 4),
        "loss_last": round(sum(values[-count:]) / count, 4),
        "iterations": iterations_done(work_dir, logged=losses[-1][0]),
        "seconds": round(seconds, 1),
    }


def normalize(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().rstrip(".。").strip().casefold()


def is_correct(prediction: str, answer: str) -> bool:
    return normalize(prediction) == normalize(answer)


def chance_level(questions_and_answers: Sequence[tuple[str, str]]) -> float:
    """Share that the best guess without an image gets right, 0 to 1."""
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in questions_and_answers:
        by_question[question][normalize(answer)] += 1
    most_frequent = sum(max(answers.values()) for answers in by_question.values())
    return most_frequent / len(questions_and_answers)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Records ``id, image, question, answer, prediction``, with ``correct`` added."""
    if not path.is_file():
        raise ReportError(f"{path} is missing: run.py writes it after the conversion")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records:
        raise ReportError(f"{path} holds no prediction")
    for record in records:
        record["correct"] = is_correct(record["prediction"], record["answer"])
    return records


def build_report(work_dir: Path) -> dict[str, Any]:
    """The content of ``report.json`` from what a run left in ``work_dir``.

    Raises:
        ReportError: a stage's log, the timings or the predictions are missing.
    """
    timings_file = work_dir / "timings.json"
    if not timings_file.is_file():
        raise ReportError(f"{timings_file} is missing: run.py writes it")
    timings = json.loads(timings_file.read_text(encoding="utf-8"))
    heldout = read_predictions(work_dir / "predictions.jsonl")
    pairs = [(record["question"], record["answer"]) for record in heldout]
    return {
        "stages": {
            name: summarize_stage(work_dir / folder, seconds=timings[folder])
            for name, folder in STAGES.items()
        },
        "heldout_accuracy": round(sum(r["correct"] for r in heldout) / len(heldout), 4),
        "chance": round(chance_level(pairs), 4),
        "seconds": round(sum(timings.values()), 1),
        "steps_seconds": timings,
        "heldout": heldout,
    }


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_report(report: dict[str, Any]) -> str:
    """What the quickstart prints: losses, accuracy by modality, a few answers."""
    rows = [("stage", "loss before", "loss after", "iterations", "seconds")]
    for name, stage in report["stages"].items():
        numbers = (stage["loss_first"], stage["loss_last"])
        cells = [f"{number:.3f}" for number in numbers]
        rows.append((name, *cells, str(stage["iterations"]), f"{stage['seconds']:.0f}"))
    by_modality: defaultdict[str, list[bool]] = defaultdict(list)
    for record in report["heldout"]:
        by_modality[modality_of(record)].append(record["correct"])
    right = sum(record["correct"] for record in report["heldout"])
    total = f"{right}/{len(report['heldout'])}"
    scores = [("held-out questions", "right", "accuracy")]
    for modality, correct in by_modality.items():
        share = f"{sum(correct) / len(correct):.2f}"
        scores.append((f"  {modality}", f"{sum(correct)}/{len(correct)}", share))
    scores.append(("  all", total, f"{report['heldout_accuracy']:.2f}"))
    scores.append(("  chance", "", f"{report['chance']:.2f}"))
    answers = []
    step = max(1, len(report["heldout"]) // EXAMPLES)
    for record in report["heldout"][::step][:EXAMPLES]:
        mark = "right" if record["correct"] else f"wrong: {record['answer']}"
        answers.append(f"  {record['question']}\n    -> {record['prediction']}  ({mark})")
    return "\n\n".join((align(rows), align(scores), "example answers\n" + "\n".join(answers)))


def modality_of(record: dict[str, Any]) -> str:
    """The modality in an id of the form ``2d#cls#<modality>#<dataset>#<path>``."""
    return record["id"].split("#")[2]


def pick_for_picture(heldout: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first `PICTURE_COLUMNS` English questions of each modality, right or wrong as they come.

    English only, because matplotlib's own font has no Chinese.
    """
    picked: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in heldout:
        row = picked[modality_of(record)]
        if record["question"].isascii() and len(row) < PICTURE_COLUMNS:
            row.append(record)
    return [record for row in picked.values() for record in row]


def draw_answers(report: dict[str, Any], images: Path, target: Path) -> None:
    """Held-out images with question and answer, green where right, red where wrong.

    Args:
        report: as `build_report` makes it.
        images: folder that the records' image paths are relative to.
        target: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    records = pick_for_picture(report["heldout"])
    rows = -(-len(records) // PICTURE_COLUMNS)
    figure, axes = pyplot.subplots(
        rows,
        PICTURE_COLUMNS,
        figsize=(1.85 * PICTURE_COLUMNS, 2.4 * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, record in zip(axes.flat, records, strict=False):
        with Image.open(images / record["image"]) as image:
            axis.imshow(image.convert("RGB"), interpolation="bicubic")
        question = "\n".join(textwrap.wrap(record["question"], 27, max_lines=2, placeholder=" ..."))
        axis.set_title(question, fontsize=7.5, color="#555555", pad=5)
        color = "#18794e" if record["correct"] else "#c62a2f"
        answer = textwrap.shorten(record["prediction"] or "(nothing)", 24, placeholder=" ...")
        place = {"ha": "center", "va": "top", "transform": axis.transAxes}
        axis.text(0.5, -0.03, answer, fontsize=10, fontweight="bold", color=color, **place)
        truth = f"true label: {record['answer']}"
        axis.text(0.5, -0.165, truth, fontsize=7.5, color="#555555", **place)
    figure.suptitle(
        f"Held-out images, asked after stage 3: {report['heldout_accuracy']:.0%} of "
        f"{len(report['heldout'])} right, chance {report['chance']:.0%}",
        fontsize=12,
    )
    figure.savefig(target, dpi=110, facecolor="white")
    pyplot.close(figure)


def write_report(work_dir: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``answers.png`` into ``work_dir``; print the table."""
    report = build_report(work_dir)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (work_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    draw_answers(report, work_dir / "corpus" / "images", work_dir / "answers.png")
    print("\n" + format_report(report))
    print(f"\n{work_dir / 'report.json'}\n{work_dir / 'answers.png'}")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report on a finished quickstart run.")
    parser.add_argument("work_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        write_report(options.work_dir)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

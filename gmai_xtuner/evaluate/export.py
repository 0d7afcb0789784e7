# SPDX-License-Identifier: Apache-2.0

"""A result in the files of others: the hub's ``eval_results.yaml``, an Inspect log, samples of lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.evaluate.compare import results_in
from gmai_xtuner.evaluate.results import RESULT_FILE, Result, read_scores

FORMATS = {
    "eval_results": "eval_results.yaml",
    "inspect": "inspect.json",
    "lmms-eval": "samples.jsonl",
}
"""Format -> the name of its file, beside the result where no other is given."""
_STOPPED = {
    "stop": "stop",
    **dict.fromkeys(("length", "max_tokens"), "max_tokens"),
    **dict.fromkeys(("content_filter", "refusal"), "content_filter"),
}


def export(
    run: Path, how: str, *, out: Path | None = None, dataset: str | None = None, task: str = ""
) -> Path:
    """Write the one result under a folder in a format of :data:`FORMATS`; return the file.

    ``dataset`` and ``task`` are the benchmark's repository on the hub and its task there. An
    ``EvaluationError`` where there is no result, several, or one that is not the benchmark's as a whole.
    """
    found = list(results_in(run).values())
    if len(found) > 1:
        folders = ", ".join(str(folder) for folder, _ in found)
        raise EvaluationError(f"{run} has {len(found)} results. Export one of them: {folders}")
    ((folder, result),) = found
    if how == "eval_results":
        entries = [_entry(folder, result, dataset, task)]
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    elif how == "inspect":
        text = json.dumps(_inspect_log(folder, result), indent=1, ensure_ascii=False) + "\n"
    else:
        lines = [line for line in read_scores(folder).values() if _is_answered(line)]
        samples = map(_sample, range(len(lines)), lines)
        text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in samples)
    file = out or folder / FORMATS[how]
    replace_text(file, text)
    return file


def _entry(folder: Path, result: Result, dataset: str | None, task: str) -> dict[str, Any]:
    value, ends = result.headline.value, result.headline.interval
    lacks = result.limited or result.unanswered or not result.complete
    if value is None or lacks or result.expected not in (None, result.selected):
        problems = "; ".join(result.problems) or "it has no score"
        raise EvaluationError(f"{folder} is no score of {result.benchmark} as a whole: {problems}")
    if not dataset:
        raise EvaluationError(
            f"the hub's repository of {result.benchmark} is not known: name it (--dataset OWNER/NAME, "
            "and its task there, --task ID)"
        )
    average = f"{next(iter(result.averages))} average of n = {result.n}"
    notes = [f"{result.protocol}/{result.version}", f"scorer {result.scorer}", average]
    notes += [f"95 % interval {100 * ends.low:.2f} to {100 * ends.high:.2f}"] if ends else []
    notes += [f"unparsed {100 * result.headline.unparsed:.2f} %", *result.problems]
    about, score = {"id": dataset, "task_id": task or "default"}, round(100 * value, 2)
    return {"dataset": about, "value": score, "notes": ", ".join(notes)}


def _inspect_log(folder: Path, result: Result) -> dict[str, Any]:
    lines, scored_at = read_scores(folder), (folder / RESULT_FILE).stat().st_mtime
    cells = {name: cell.value for name, cell in result.averages.items() if cell.value is not None}
    metrics = {name: {"name": name, "value": value} for name, value in cells.items()}
    about = f"{result.benchmark}_{result.variant}"
    spec = {
        "eval_id": f"{result.model[:12]}-{result.protocol}",
        "run_id": result.model[:12],
        "created": datetime.fromtimestamp(scored_at, UTC).isoformat(timespec="seconds"),
        "task": f"{about}_{result.protocol}",
        "task_version": result.version,
        "dataset": {"name": about, "samples": result.selected, "sample_ids": list(lines)},
        "model": result.model_name,
        "model_generate_config": {"max_tokens": result.generation.get("max_new_tokens")},
        "config": {},
        "metadata": {"problems": result.problems, "source": dict(result.source)},
    }
    results = {
        "total_samples": len(lines),
        "completed_samples": sum(map(_is_answered, lines.values())),
        "scores": [{"name": result.scorer, "scorer": result.scorer, "metrics": metrics}],
    }
    samples = [_inspect_sample(line, result) for line in lines.values()]
    log = {"version": 2, "status": "success", "eval": spec}
    return {**log, "results": results, "samples": samples}


def _inspect_sample(line: Mapping[str, Any], result: Result) -> dict[str, Any]:
    said = {"role": "assistant", "content": line["answer"], "source": "generate"}
    score = {"value": line["value"], "answer": line["parsed"]}
    choices = [{"message": said, "stop_reason": _STOPPED.get(line["ended"], "unknown")}]
    return {
        "id": line["id"],
        "epoch": 1,
        "input": line["text"],
        "choices": list(line["options"].values()) or None,
        "target": _target(line),
        "messages": [{"role": "user", "content": line["text"], "source": "input"}, said],
        "output": {"model": result.model_name, "choices": choices, "completion": line["answer"]},
        "scores": {} if line["value"] is None else {result.scorer: score},
        "metadata": line["groups"],
    }


def _is_answered(line: Mapping[str, Any]) -> bool:
    """Tell an answer from one that was cut, empty or refused, which has no score."""
    return line["value"] is not None or line["parsed"] is not None


def _target(line: Mapping[str, Any]) -> str:
    """Return the letter of the gold answer; its text without options, and nothing where it is kept."""
    return line["target"] or line["gold"] or ""


def _sample(place: int, line: Mapping[str, Any]) -> dict[str, Any]:
    doc = {**line["groups"], "id": line["id"], "question": line["text"], "options": line["options"]}
    said = {"resps": [[line["answer"]]], "filtered_resps": [line["parsed"]]}
    return {"doc_id": place, "doc": doc, "target": _target(line), **said, "score": line["value"]}

# SPDX-License-Identifier: Apache-2.0

"""Validation, sample answers and benchmarks beside a real training on two ranks under ZeRO-3.

The training does not notice. ``xtuner test`` asks its checkpoint.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmai_xtuner.checkpoint.training import iteration_of, newest_whole
from gmai_xtuner.checkpoint.weights import read_training_state
from tests.commands.runner import Xtuner, last_checkpoint, scalars
from tests.evaluate.sets import write_pmc_vqa, write_vqa_rad
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

OPTIONS = (
    "train_dataloader.batch_size=2",
    "train_dataloader.dataset.max_length=160",
    "train_dataloader.dataset.held_out=0.25",
    "optim_wrapper.accumulative_counts=2",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.save_optimizer=False",
    "optim_wrapper.optimizer.lr=1e-3",
    "optim_wrapper.optimizer.lr_by_part.projector=2e-3",
    "model.pretrained_pth=None",
    "train_cfg.max_epochs=2",
)
"""Batches of two packs in steps of two, on two ranks."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bases):
    """What a run with validation and sample answers printed and logged, and the same run without."""
    folder = tmp_path_factory.mktemp("watching")
    text = [record(f"r{n}", f"Is {n} even?", f"Yes, {n}.") for n in range(0, 40, 2)]
    images = [
        record(f"r{n}", f"<image>\nIs {n} even?", f"No, {n}.", image=f"{n // 4}.png")
        for n in range(1, 40, 2)
    ]
    corpus = write_corpus(
        folder / "corpus",
        {"text": text, "images": images},
        images=[f"{n}.png" for n in range(10)],
        fields={"text": {"category": "General Text"}, "images": {"category": "Pictures"}},
    )
    data = folder / "benchmarks"
    write_vqa_rad(data / "VQA-RAD")
    write_pmc_vqa(data / "PMC-VQA")
    xtuner = Xtuner.tiny(tiny_bases, corpus.mixture, folder / "cache", GMAI_BENCHMARKS=data)
    # Three questions on two ranks: one is asked twice.
    watched = (
        "train_cfg.val_interval=2",
        "default_hooks.sample_answer.interval=2",
        "default_hooks.best.keep=True",
        "val_cfg.benchmark_interval=4",
        f"val_cfg.benchmarks.rad.data={data / 'VQA-RAD'}",
        "val_cfg.benchmarks.rad.benchmark=vqa_rad",
    )
    alone = (
        "val_dataloader=None",
        "val_cfg=None",
        "val_evaluator=None",
        "default_hooks.sample_answer.interval=0",
    )
    return {"xtuner": xtuner} | {
        name: (
            folder / name,
            xtuner.train(
                "stage3_instruct", folder / name, *OPTIONS, *options, deepspeed="zero3", ranks=2
            ),
        )
        for name, options in (("watched", watched), ("alone", alone))
    }


def trained(work_dir: Path) -> dict[int, tuple[float, float]]:
    return {
        row["iter"]: (row["loss"], row.get("grad_norm")) for row in scalars(work_dir) if "lr" in row
    }


def every_second_step(last: int) -> list[int]:
    """Iterations; the steps of two micro-batches begin anew in the second of two epochs."""
    epoch = last // 2
    ends = [i for i in range(1, epoch + 1) if i % 2 == 0 or i == epoch]
    return [*ends, *(epoch + end for end in ends)][1::2]


def test_training_does_not_notice(runs):
    watched, alone = (trained(runs[name][0]) for name in ("watched", "alone"))
    assert len(alone) >= 6
    assert watched == alone


def test_validation_is_logged_where_a_step_ends(runs):
    work_dir, printed = runs["watched"]
    rows = {row["step"]: row for row in scalars(work_dir) if "val/loss" in row}
    last = max(trained(work_dir))
    # Every second optimiser step, and the end of the run.
    assert list(rows) == sorted({*every_second_step(last), last})
    first, end = rows[min(rows)], rows[max(rows)]
    assert set(first) >= {
        "val/loss",
        "val/perplexity",
        "val/loss/General_Text",
        "val/loss/Pictures",
    }
    assert end["val/loss"] < first["val/loss"]
    assert first["val/perplexity"] == pytest.approx(np.exp(first["val/loss"]), rel=1e-6)
    assert re.search(r"held out for validation: \d+ of 40 conversations \(share 0\.25", printed)
    assert printed.count("val/loss: ") == len(rows)


def test_the_best_checkpoint_lies_beside_the_others(runs):
    work_dir, _ = runs["watched"]
    scores = {row["step"]: row["val/loss"] for row in scalars(work_dir) if "val/loss" in row}
    newest, passed_over = newest_whole(work_dir / "best")
    assert (newest.name, passed_over) == (f"iter_{min(scores, key=scores.get)}.pth", {})
    assert read_training_state(newest)["meta"]["iter"] == iteration_of(newest)
    assert newest_whole(work_dir)[0].parent == work_dir


def test_each_part_has_its_learning_rate(runs):
    for row in scalars(runs["alone"][0]):
        if "lr" in row:
            assert row["projector_lr"] == pytest.approx(2 * row["visual_encoder_lr"])
            assert row["llm_lr"] == row["visual_encoder_lr"] == row["base_lr"]


def test_sample_answers_are_in_the_log_and_in_tensorboard(runs):
    work_dir, printed = runs["watched"]
    last = max(trained(work_dir))
    told = re.findall(
        r"Sample answer at iteration (\d+), (images/r\d+):\n  question: (.*)\n  reference: (.*)\n"
        r"  answer: (.*)",
        printed,
    )
    assert {int(step) for step, *_ in told} == {*every_second_step(last), last}
    ((name, question, reference),) = {sample[1:4] for sample in told}
    number = name.removeprefix("images/r")
    assert question == f"Is {number} even?"
    assert reference == f"No, {number}."
    events = EventAccumulator(str(next(work_dir.rglob("events.out.tfevents*")).parent))
    events.Reload()
    tags = events.Tags()
    assert "val/loss" in tags["scalars"]
    assert f"sample_answer/{name}/text_summary" in tags["tensors"]
    assert f"sample_answer/{name}/0" in tags["images"]
    assert "val/rad/accuracy" in tags["scalars"]


def test_benchmarks_are_asked_at_their_interval_and_at_the_end(runs):
    work_dir, printed = runs["watched"]
    assert "Benchmark rad: 3 of 3 questions of the protocol closed-251/2" in printed
    rows = [row for row in scalars(work_dir) if "val/rad/accuracy" in row]
    last = max(trained(work_dir))
    assert [row["step"] for row in rows] == sorted({*every_second_step(last)[1::2], last})
    assert all(0 <= row["val/rad/unparsed"] <= 1 for row in rows)
    assert all(row["val/rad/accuracy"] <= 1 - row["val/rad/unparsed"] for row in rows)


def test_xtuner_test_asks_every_benchmark(runs, tmp_path):
    checkpoint = last_checkpoint(runs["watched"][0])
    told = runs["xtuner"](
        *("test", "configs/gmai_vl/stage3_instruct.py", "--checkpoint", checkpoint),
        *("--work-dir", tmp_path / "tested", "--cfg-options", "model.pretrained_pth=None"),
        *("test_dataloader.num_workers=0", f"test_evaluator.save={tmp_path / 'answers'}"),
    )
    shown = r"Iter\(test\) \[7/7\].*test/pmc_vqa_test_clean/accuracy: [\d.]+ .*test/vqa_rad_test/accuracy"
    assert re.search(shown, told), told[-3000:]
    lines = (tmp_path / "answers" / "pmc_vqa_test_clean.jsonl").read_text().splitlines()
    answers = {line["id"]: line for line in map(json.loads, lines)}
    assert len(answers) == 4
    assert answers["0"]["prompt"].startswith("What is figure 0?\nA. thing 0A\n")
    for line in answers.values():  # a cut answer is none, and is shown all the same
        assert (line["value"] is None) == (line["ended"] == "length")

# SPDX-License-Identifier: Apache-2.0

"""Benchmarks beside a real training on two ranks under ZeRO-3, and ``xtuner test`` on its checkpoint."""

from __future__ import annotations

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands.runner import Xtuner, last_checkpoint, scalars
from tests.evaluate.sets import write_pmc_vqa, write_vqa_rad
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

OPTIONS = (
    "train_dataloader.batch_size=2",
    "train_dataloader.dataset.max_length=160",
    "optim_wrapper.accumulative_counts=2",
    "default_hooks.logger.interval=1",
    "default_hooks.sample_answer.interval=0",
    "default_hooks.checkpoint.save_optimizer=False",
    "model.pretrained_pth=None",
    "train_cfg.val_interval=1",
    "val_cfg.benchmark_interval=2",
)


def test_benchmarks_in_training_and_xtuner_test(tmp_path, tiny_bases):
    records = [
        record(f"r{n}", f"<image>\nIs {n} even?", ("Yes", "No")[n % 2], image="x.png")
        for n in range(24)
    ]
    corpus = write_corpus(tmp_path / "corpus", {"a": records}, images=["x.png"])
    data = tmp_path / "benchmarks"
    write_vqa_rad(data / "VQA-RAD")
    write_pmc_vqa(data / "PMC-VQA")
    xtuner = Xtuner.tiny(
        tiny_bases,
        corpus.mixture,
        tmp_path / "cache",
        GMAI_BENCHMARKS=data,
    )
    work_dir = tmp_path / "run"
    # Three questions on two ranks: one is asked twice. Nothing is held out: they are asked all the same.
    printed = xtuner.train(
        "stage3_instruct",
        work_dir,
        *OPTIONS,
        f"val_cfg.benchmarks.rad.data={data / 'VQA-RAD'}",
        "val_cfg.benchmarks.rad.benchmark=vqa_rad",
        deepspeed="zero3",
        ranks=2,
    )
    assert "Benchmark rad: 3 of 3 questions of the protocol closed-251/2" in printed
    rows = [row for row in scalars(work_dir) if "val/rad/accuracy" in row]
    assert [row["step"] for row in rows] == [4, 6]
    assert all(0 <= row["val/rad/unparsed"] <= 1 for row in rows)
    assert all(row["val/rad/accuracy"] <= 1 - row["val/rad/unparsed"] for row in rows)
    events = EventAccumulator(str(next(work_dir.rglob("events.out.tfevents*")).parent))
    assert "val/rad/accuracy" in events.Reload().Tags()["scalars"]

    told = xtuner(
        *("test", "configs/gmai_vl/stage3_instruct.py", "--checkpoint", last_checkpoint(work_dir)),
        *("--work-dir", tmp_path / "tested", "--cfg-options", "model.pretrained_pth=None"),
        *("test_dataloader.num_workers=0", f"test_evaluator.save={tmp_path / 'answers'}"),
    )
    assert re.search(
        r"Iter\(test\) \[7/7\].*test/pmc_vqa_test_clean/accuracy: [\d.]+ .*"
        r"test/vqa_rad_test/accuracy: [\d.]+",
        told,
    ), told[-3000:]
    lines = (tmp_path / "answers" / "pmc_vqa_test_clean.jsonl").read_text().splitlines()
    answers = {line["id"]: line for line in map(json.loads, lines)}
    assert len(answers) == 4
    assert answers["0"]["prompt"].startswith("What is figure 0?\nA. thing 0A\n")
    for line in answers.values():  # a cut answer is none, and is shown all the same
        assert (line["value"] is None) == (line["ended"] == "length")

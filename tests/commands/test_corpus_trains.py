"""Pictures in folders -> corpus -> training, by the two real commands; nothing in between is touched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.mixture import load_mixture
from tests.commands.runner import ROOT, Xtuner, last_checkpoint, scalars

pytestmark = pytest.mark.slow

JOB = """
output: corpus
title: Two kinds of cells
workers: 2
sources:
  - name: cells
    reader: image_folder
    root: cells
    licence: CC0
    modality: Microscopy
    department: Hematology
    clinical_task: Cell Recognition
make: {caption: 1, instruction: 1, dialogue: 1, perception: 1, text_single: 1, text_multi: 1}
corpus: {held_out: 0.2}
"""
FORMS = ("caption", "instruct", "percept", "text-single", "text-multi")
OPTIONS = (
    "train_dataloader.batch_size=1",
    "train_dataloader.dataset.max_length=256",
    "train_dataloader.dataset.held_out=0",
    "optim_wrapper.accumulative_counts=2",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.save_optimizer=False",
    "model.pretrained_pth=None",
    "train_cfg.max_epochs=1",
)
"""Micro-batches of a pack, two to a step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of two kinds of cells, 20 pictures each."""
    folder = tmp_path_factory.mktemp("corpus_trains")
    random = np.random.default_rng(0)
    for name in ("neutrophil", "lymphocyte"):
        (folder / "cells" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "cells" / name / f"{number}.png")
    (folder / "job.yaml").write_text(JOB, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "data_tools/generate.py", folder / "job.yaml"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_mixture_has_every_form_and_nothing_that_is_held_out(folder):
    corpus = folder / "corpus"
    entries = load_mixture(corpus / "mixture.yaml").entries
    assert [entry.name for entry in entries] == [f"two-kinds-of-cells-{form}" for form in FORMS]
    summary = json.loads((corpus / "summary.json").read_text(encoding="utf-8"))
    assert summary["records"]["count"] == 40
    assert 0 < summary["records"]["held_out"] < 40

    def pictures(side: str) -> set[str]:
        lines = (corpus / side / "caption.jsonl").read_bytes().splitlines()
        return {json.loads(line)["image"] for line in lines}

    assert len(pictures("")) + len(pictures("held_out")) == 40
    assert not pictures("") & pictures("held_out")


def test_stage_3_trains_on_the_corpus_as_it_is(folder, tiny_bases):
    xtuner = Xtuner.tiny(
        tiny_bases,
        folder / "corpus" / "mixture.yaml",
        folder / "cache",
    )
    work_dir = folder / "stage3"
    output = xtuner.train("stage3_instruct", work_dir, *OPTIONS)
    rows = [row for row in scalars(work_dir) if "loss" in row]
    assert len(rows) >= 4, output[-3000:]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert last_checkpoint(work_dir).name == f"iter_{len(rows)}.pth"
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    files = json.loads((folder / "corpus" / "summary.json").read_text(encoding="utf-8"))["files"]
    for form in FORMS:
        (meta,) = (folder / "cache" / "tokens").glob(f"two-kinds-of-cells-{form}-*/meta.json")
        cached = json.loads(meta.read_text(encoding="utf-8"))
        assert cached["kept"] == files[f"{form.replace('-', '_')}.jsonl"]["lines"]
        assert cached["skipped"] == {}

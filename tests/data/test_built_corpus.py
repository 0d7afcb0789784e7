# SPDX-License-Identifier: Apache-2.0

"""Images in folders -> corpus -> packs of stage 3; nothing in between is touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import generate
from gmai_xtuner.core.constants import IGNORE_INDEX
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.data.dataset import SoftPackedDataset

JOB = """
output: corpus
title: Two kinds of cells
workers: 1
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
    assert generate.main([str(folder / "job.yaml")]) == 0
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


def test_stage_3_plans_the_corpus_as_it_is(folder, tiny_bases, tokenizer):
    dataset = SoftPackedDataset(
        str(folder / "corpus" / "mixture.yaml"),
        "stage3",
        tokenizer=tokenizer,
        vision=str(tiny_bases / "vision"),
        cache_dir=str(folder / "cache"),
        max_length=256,
        num_workers=1,
    )
    assert all(
        (item["labels"] != IGNORE_INDEX).any() for item in map(dataset.__getitem__, range(9))
    )
    files = json.loads((folder / "corpus" / "summary.json").read_text(encoding="utf-8"))["files"]
    for form, cache in zip(FORMS, dataset.caches, strict=True):
        assert cache.meta["kept"] == files[f"{form.replace('-', '_')}.jsonl"]["lines"]
        assert cache.meta["skipped"] == {}

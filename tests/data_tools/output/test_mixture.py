# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.output import build as builder
from data_tools.output import files
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.core.records import iter_raw
from tests.data_tools.output.fake_store import FakeStore, corpus, job

CAPTION, INSTRUCTION, TEXT = "Medical Captioning", "Medical Instruction", "Medical Text"


def read(file: Path) -> dict[str, list]:
    """Every dataset's conversations as a training reads them; pictures must be there."""
    found = {}
    for entry in load_mixture(file).entries:
        found[entry.name] = [
            parse_raw(raw, dataset=entry.name)
            for path in entry.annotations
            for raw in iter_raw(path)
        ]
        assert len(found[entry.name]) == entry.size
        for conversation in found[entry.name]:
            assert bool(conversation.images) == (entry.image_root is not None)
            for image in conversation.images:
                assert (entry.image_root / image).is_file()
    return found


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, FakeStore]:
    store = corpus(tmp_path, 60)
    builder.build(store, job(held_out=0.3), tmp_path)
    return tmp_path, store


def test_a_training_reads_every_conversation_and_none_that_is_held_out(built):
    folder, store = built
    training, held_out = read(folder / "mixture.yaml"), read(folder / "held_out.yaml")
    ids = [one.id for part in (training, held_out) for found in part.values() for one in found]
    assert sorted(ids) == sorted(kept.item.id for kept in store.all_accepted)
    images = [
        {image for found in part.values() for one in found for image in one.images}
        for part in (training, held_out)
    ]
    assert all(images)
    assert not images[0] & images[1]


def test_categories_and_ratios_are_those_of_the_papers_table_7(built):
    entries = {entry.name: entry for entry in load_mixture(built[0] / "mixture.yaml").entries}
    assert {
        name: (one.category, one.quality, *one.ratios.values()) for name, one in entries.items()
    } == {
        "demo-corpus-caption": (CAPTION, "high", 1, 1, 1),
        "demo-corpus-instruct": (INSTRUCTION, "high", 1, 1, 1),
        "demo-corpus-percept": (INSTRUCTION, "high", 1, 1, 1),
        "demo-corpus-text-single": (TEXT, "high", 0, 0, 1),
        "demo-corpus-text-multi": (TEXT, "high", 0, 0, 1),
    }


def test_a_mixture_without_a_conversation_is_not_written(tmp_path):
    files.write_mixtures(tmp_path, title="T", files={"records.jsonl": {"lines": 5}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Our Corpus: 2026 / v1", "our-corpus-2026-v1-percept"),
        ("眼底 数据", "眼底-数据-percept"),
        ("--- #!?", "corpus-percept"),
        ('a: "b"\n- c', "a-b-c-percept"),
    ],
)
def test_a_title_becomes_part_of_the_names(tmp_path, title, name):
    (tmp_path / "percept.jsonl").write_text("{}\n")
    files.write_mixtures(tmp_path, title=title, files={"percept.jsonl": {"lines": 1}})
    (entry,) = load_mixture(tmp_path / "mixture.yaml").entries
    assert entry.name == name

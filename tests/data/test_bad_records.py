# SPDX-License-Identifier: Apache-2.0

"""Bad records are told all at once, by ``raise`` and by ``skip``."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import generate
from gmai_xtuner.core.constants import IGNORE_INDEX
from gmai_xtuner.core.errors import DataError
from gmai_xtuner.data import token_cache
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.token_cache import TokenCache
from gmai_xtuner.data.tokenize_records import BadRecords
from tests.data.conftest import OPTIONS
from tests.toy import Corpus, record

RAISE = OPTIONS
SKIP = replace(RAISE, on_bad_sample="skip")
GOOD = record("good", "What?", "A CT scan.")
TOO_LONG = record("long", "What?", "No. " * 300)


def lost(number: int) -> dict:
    return record(f"lost{number}", "<image>?", "Yes.", image=f"lost{number}.png")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_records_come_in_one_error(make_corpus, cached, workers):
    records = [GOOD] * 2000
    for number in range(25):
        records[80 * number] = lost(number)  # in several chunks
    records.append(b"{")
    corpus = make_corpus({"toy": records})
    with pytest.raises(BadRecords) as caught:
        cached(corpus, num_workers=workers)
    error = caught.value
    assert (error.count, error.reasons) == (26, {"missing_image": 25, "not_json": 1})
    assert (error.dataset, error.reason) == ("toy", "bad_records")
    message = str(error)
    assert "26 of 2001 records are bad (25 missing_image, 1 not_json)" in message
    shown = [line for line in message.splitlines() if line.startswith("  lost")]
    assert len(shown) == 20
    assert shown[1].startswith("  lost1 (toy.jsonl, line 81): image '")
    assert "and 6 more" in message
    assert message.count("Check image_root") == 1
    assert "Each line must be one whole JSON object" in message  # a remedy of what is not shown
    assert str(error.listing) in message
    listed = lines(error.listing)
    assert [note["id"] for note in listed[:25]] == [f"lost{number}" for number in range(25)]
    assert listed[24]["images"] == {"lost24.png": "missing_image"}
    assert listed[25]["where"] == "toy.jsonl, line 2001"


def test_memory_is_bounded_by_the_errors_shown(make_corpus, cached, monkeypatch):
    kept = []
    original = token_cache.BadList.error
    monkeypatch.setattr(
        token_cache.BadList,
        "error",
        lambda self, *args, **facts: (
            kept.append((len(self.first), len(self.remedies))) or original(self, *args, **facts)
        ),
    )
    corpus = make_corpus({"toy": [GOOD, *(lost(number) for number in range(600))]})
    with pytest.raises(BadRecords):
        cached(corpus)
    assert kept == [(20, 1)]


def test_every_bad_image_of_a_record_is_named(make_corpus, cached):
    two = record("two", "<image> <image> <image>", "No.", image=["x.png", "a.png", "y.png"])
    corpus = make_corpus({"toy": [GOOD, two]}, images=("a.png",))
    with pytest.raises(BadRecords) as caught:
        cached(corpus)
    (note,) = lines(caught.value.listing)
    assert note["images"] == {"x.png": "missing_image", "y.png": "missing_image"}
    assert "x.png" in str(caught.value)
    assert "y.png" in str(caught.value)
    assert "a.png" not in str(caught.value)


def test_the_error_crosses_processes_and_files_whole(make_corpus, cached):
    corpus = make_corpus({"toy": [GOOD, lost(1), lost(2)]})
    with pytest.raises(BadRecords) as caught:
        cached(corpus)
    for other in (
        pickle.loads(pickle.dumps(caught.value)),
        BadRecords(**json.loads(json.dumps(caught.value.facts))),
    ):
        assert str(other) == str(caught.value)
        assert (other.count, other.listing, other.rest) == (
            2,
            caught.value.listing,
            caught.value.rest,
        )


def test_the_rest_can_be_looked_at_until_a_build_succeeds(make_corpus, cached):
    corpus = make_corpus({"toy": [GOOD, lost(1), TOO_LONG]})
    with pytest.raises(BadRecords) as caught:
        cached(corpus)
    rest = TokenCache(caught.value.rest)
    assert [rest[row].id for row in range(len(rest))] == ["good"]
    assert rest.meta["skipped"] == {"missing_image": 1, "over_length": 1}
    (corpus.images / "lost1.png").write_bytes(_picture())
    cache = cached(corpus)
    assert [cache[row].id for row in range(len(cache))] == ["good", "lost1"]
    assert not caught.value.rest.exists()


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- one cache for both policies ------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(RAISE, SKIP), (SKIP, RAISE)])
def test_policies_share_a_cache_where_nothing_is_bad(
    make_corpus, cached, monkeypatch, first, second
):
    corpus = make_corpus({"toy": [GOOD, TOO_LONG]})
    folder = cached(corpus, first).folder
    monkeypatch.setattr(token_cache, "_build", None)
    assert cached(corpus, second).folder == folder


def test_raise_never_takes_the_cache_that_skip_has_cut(make_corpus, cached):
    corpus = make_corpus({"toy": [GOOD, lost(1)]})
    skipped = cached(corpus, SKIP)
    assert len(skipped) == 1
    with pytest.raises(BadRecords):
        cached(corpus, RAISE)
    assert skipped.folder.is_dir()
    (corpus.images / "lost1.png").write_bytes(_picture())
    whole = cached(corpus, RAISE)
    assert (len(whole), whole.folder != skipped.folder) == (2, True)
    # A run that began with the skipping cache is resumed with it.
    assert cached(corpus, SKIP).folder == skipped.folder


def test_those_who_waited_for_a_build_hear_of_its_bad_records_at_once(
    make_corpus, cached, monkeypatch
):
    corpus = make_corpus({"toy": [GOOD, lost(1)]})
    with pytest.raises(BadRecords) as caught:
        cached(corpus)
    built = []
    original = token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda *args: built.append(1) or original(*args))
    monkeypatch.setattr(token_cache.time, "time", lambda: caught.value.listing.stat().st_mtime - 1)
    with pytest.raises(BadRecords) as again:  # as if it had begun to wait before
        cached(corpus)
    assert str(again.value) == str(caught.value)
    assert built == []
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "_build", lambda *args: built.append(1) or original(*args))
    with pytest.raises(BadRecords):  # a new start looks again
        cached(corpus)
    assert built == [1]


# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [RAISE, SKIP])
def test_a_broken_file_hides_nothing_of_the_others(make_corpus, cached, options):
    corpus = _with_broken_file(make_corpus)
    with pytest.raises(BadRecords) as caught:
        cached(corpus, options)
    assert caught.value.reasons == {"missing_image": 1, "not_json": 1}
    message = str(caught.value)
    assert "broken.json' is not valid JSON" in message
    assert "lost1 (toy.jsonl, line 2)" in message
    assert "on_bad_sample" not in message  # skipping does not mend a file


def _with_broken_file(make_corpus) -> Corpus:
    corpus = make_corpus({"toy": [GOOD, lost(1)]})
    (corpus.folder / "broken.json").write_text("[{]")
    corpus.mixture.write_text(
        corpus.mixture.read_text().replace(
            "annotations: toy.jsonl", "annotations: [broken.json, toy.jsonl]"
        )
    )
    return corpus


# --- several datasets -----------------------------------------------------------------------------


def test_several_datasets_tell_their_bad_records_together(make_corpus, build, tmp_path):
    corpus = make_corpus({"a": [GOOD, lost(1)], "b": [GOOD], "c": [lost(2), b"["]})
    with pytest.raises(DataError) as caught:
        build(corpus.mixture)
    message = str(caught.value)
    assert "2 of 3 datasets can't be used (a, c)" in message
    assert "lost1.png" in message
    assert "lost2.png" in message
    assert "c.jsonl, line 2" in message
    # What is good is kept.
    tokens = tmp_path / "cache" / "tokens"
    made = {path.name[0]: path.suffix for path in tokens.iterdir() if path.is_dir()}
    assert made == {"a": ".bad", "b": "", "c": ".bad"}


def test_the_error_of_a_single_dataset_is_its_own(make_corpus, build):
    corpus = make_corpus({"a": [GOOD, lost(1)], "b": [GOOD]})
    with pytest.raises(BadRecords, match=r"dataset 'a', record lost1 \(a.jsonl, line 2\)"):
        build(corpus.mixture)
    assert [len(cache) for cache in build(corpus.mixture, on_bad_sample="skip").caches] == [1, 1]


# --- Images in folders -> corpus -> packs of stage 3; nothing in between is touched ---


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

# SPDX-License-Identifier: Apache-2.0

import json
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmai_xtuner.core.constants import IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import DataError, GMAIError
from gmai_xtuner.core.records import RawRecord, iter_raw
from gmai_xtuner.data import token_cache, tokenize_records
from gmai_xtuner.data.token_cache import TokenCache, open_cache
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from tests.data.conftest import OPTIONS, run_at_once
from tests.toy import Corpus, record

GOOD = [
    record("r0", "<image>\nWhat is shown?", "A CT scan.", image="a.png"),
    record("r1", "图中显示什么？", "肝脏。", "Sure?", "Yes."),
    record("r2", "<image>\n<image>\nSame?", "No.", image=["a.png", "b.jpg"]),
]
IMAGES = ("a.png", "b.jpg")


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    return make_corpus({"toy": GOOD}, images=IMAGES)


def refuse_to_tokenise(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ConversationTokenizer, "__call__", refuse)


def skipped(cache: TokenCache) -> list[dict[str, str]]:
    lines = (cache.folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["tokens.arrow", "counts.npy", "meta.json"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cache_of_which_a_file_is_cut_off_is_built_anew(corpus, cached, monkeypatch, name, share):
    told: list[str] = []
    monkeypatch.setattr(token_cache, "warn", told.append)
    first = cached(corpus)
    whole = files_of(first.folder)
    (first.folder / name).write_bytes(whole[name][: int(share * len(whole[name]))])
    second = cached(corpus)
    assert files_of(second.folder) == whole
    assert f"{name} is cut off or damaged" in "".join(told)


# --- what is in it --------------------------------------------------------------------------------


def test_rows_are_the_tokenised_records(corpus, cached, encode):
    cache = cached(corpus)
    assert len(cache) == 3
    for row, item in enumerate(GOOD):
        (expected,) = encode([parse_raw(RawRecord(str(row), "", item), dataset="toy")])
        assert cache[row].id == expected.id
        assert cache[row].images == expected.images
        assert cache[row].input_ids.tolist() == expected.input_ids.tolist()
        assert cache[row].labels.tolist() == expected.labels.tolist()
        assert cache.counts[row].tolist() == [
            expected.num_tokens(64),
            expected.num_labels,
            len(expected.images),
        ]
    assert cache.counts[2, 0] == len(cache[2].input_ids) + 2 * 63
    with pytest.raises(IndexError, match="row 3 of 3"):
        cache[3]


def test_a_second_start_reads_the_cache_only(corpus, cached, monkeypatch):
    first = cached(corpus)
    refuse_to_tokenise(monkeypatch)
    second = cached(corpus)
    assert second.folder == first.folder
    assert second[1].input_ids.tolist() == first[1].input_ids.tolist()
    with pytest.raises(AssertionError, match="tokenised again"):
        cached(corpus, replace(OPTIONS, max_length=255))  # the guard does stand in the way


def test_arrays_are_views_into_the_mapped_file(corpus, cached):
    cache = cached(corpus)
    assert isinstance(cache.counts, np.memmap)
    assert not cache[0].input_ids.flags.owndata
    assert len(pickle.dumps(cache)) < 1000
    assert pickle.loads(pickle.dumps(cache))[2].id == "r2"


# --- its key --------------------------------------------------------------------------------------


def test_key_holds_when_only_the_time_of_the_file_changes(corpus, cached, monkeypatch):
    first = cached(corpus)
    refuse_to_tokenise(monkeypatch)
    before = corpus.annotations("toy").stat().st_mtime_ns
    os.utime(corpus.annotations("toy"), ns=(before + 10**9, before + 10**9))
    assert corpus.annotations("toy").stat().st_mtime_ns != before
    assert cached(corpus).folder == first.folder


def test_key_changes_with_a_byte_of_the_file(corpus, cached):
    first = cached(corpus)
    path = corpus.annotations("toy")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes().replace(b"A CT scan.", b"A CT-scan."))
    assert path.stat().st_size == size
    second = cached(corpus)
    assert second.folder != first.folder
    assert second[0].input_ids.tolist() != first[0].input_ids.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 255},
        {"num_image_tokens": 32},
        {"max_images": 2},
        {"over_length": "drop"},
        {"check_images": "decode"},
        {"max_pixels": 9_999},
    ],
)
def test_key_changes_with_every_option(corpus, cached, change):
    assert cached(corpus).folder != cached(corpus, replace(OPTIONS, **change)).folder


def test_key_changes_with_template_and_tokenizer(corpus, cached, encode, tokenizer, tmp_path):
    larger = pickle.loads(pickle.dumps(tokenizer))
    larger.add_tokens(["CT scan"])
    folders = {cached(corpus).folder}
    for fast, template in (
        (tokenizer, ChatTemplate.from_xtuner("vicuna")),
        (tokenizer, ChatTemplate.from_xtuner("internlm2_chat", add_bos=False)),
        (larger, ChatTemplate.from_xtuner("internlm2_chat")),
    ):
        other = ConversationTokenizer.from_pretrained(fast, template)
        cache = open_cache(
            corpus.entry("toy"), other, OPTIONS, cache_dir=tmp_path / "cache", num_workers=1
        )
        folders.add(cache.folder)
    assert len(folders) == 4


def test_key_changes_with_the_image_root(corpus, cached):
    first = cached(corpus)
    corpus.images.rename(corpus.folder / "pictures")
    text = corpus.mixture.read_text()
    corpus.mixture.write_text(text.replace("image_root: images", "image_root: pictures"))
    assert cached(corpus).folder != first.folder


def test_name_of_a_dataset_becomes_a_safe_folder_name(corpus, cached, encode, tmp_path):
    entry = replace(corpus.entry("toy"), name="PubMedVision (captioning) / 医学 ../x")
    cache = open_cache(entry, encode, OPTIONS, cache_dir=tmp_path / "cache", num_workers=1)
    assert cache.folder.parent == tmp_path / "cache" / "tokens"
    assert cache.folder.name.startswith("PubMedVision-captioning-")


# --- many records, several processes --------------------------------------------------------------


def many_records(number: int) -> list[dict]:
    return [
        record(f"r{index}", f"Number {index}?", "Yes. " * (1 + index % 7))
        for index in range(number)
    ]


def refuse_to_be_sent(_):
    raise AssertionError("the tokenizer was sent to a worker")


def test_parallel_and_serial_builds_are_the_same_bytes(make_corpus, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_records, "RECORDS_A_CHUNK", 100)  # more than wait at a time
    corpus = make_corpus({"toy": many_records(1200)})
    serial = cached(corpus, cache_dir=tmp_path / "serial")
    pools = []
    original = tokenize_records.ProcessPoolExecutor
    monkeypatch.setattr(
        tokenize_records,
        "ProcessPoolExecutor",
        lambda *args, **kwargs: pools.append(original(*args, **kwargs)) or pools[-1],
    )
    # Sending the tokenizer with each chunk would cost ten times the chunk itself.
    monkeypatch.setattr(ConversationTokenizer, "__getstate__", refuse_to_be_sent)
    parallel = cached(corpus, cache_dir=tmp_path / "parallel", num_workers=2)
    assert len(pools) == 1  # several processes were used
    assert len(parallel) == 1200
    assert parallel[1199].id == "r1199"
    assert parallel[700].id == "r700"
    assert files_of(parallel.folder) == files_of(serial.folder)


def test_worker_runs_though_its_parent_has_tokenised_in_parallel(corpus, encode, monkeypatch):
    """A small dataset is tokenised in this process, on the tokenizer's threads; forks lack them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as importing xtuner.dataset does
    job = tokenize_records.TokenizeJob(corpus.entry("toy"), encode, OPTIONS)
    records = list(iter_raw(corpus.annotations("toy")))
    assert job(records).counts.shape == (3, 3)  # those threads are started

    def work() -> None:
        tokenize_records._take_job(job)
        assert tokenize_records._do_job(records).counts.shape == (3, 3)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(20)
    worker.kill()
    assert worker.exitcode == 0


class _DyingTokenizer(ConversationTokenizer):
    """Is killed, as by the system for its memory, when half of the records are written."""

    calls = 0

    def __call__(self, conversations):
        type(self).calls += 1
        if type(self).calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(conversations)


def test_a_build_that_was_killed_leaves_nothing_that_opens(
    make_corpus, cached, encode, tmp_path, monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # for the fork below
    corpus = make_corpus({"toy": many_records(1500)})
    dying = _DyingTokenizer(
        encode.tokenizer,
        encode.template,
        bos_token_id=encode.bos_token_id,
        eos_token_id=encode.eos_token_id,
    )

    def build() -> None:
        open_cache(corpus.entry("toy"), dying, OPTIONS, cache_dir=tmp_path / "cache", num_workers=1)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    left = [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".partial"]
    assert (left[0] / "tokens.arrow").stat().st_size > 0  # it had begun to write
    cache = cached(corpus)
    assert left[0].name.startswith(f".{cache.folder.name}.")  # the same key
    assert len(cache) == 1500
    assert not left[0].exists()


def test_two_processes_at_once_build_one_cache(corpus, encode, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # for the forks below
    builds = tmp_path / "builds"
    builds.mkdir()

    def slow_build(*args) -> Path:
        (builds / str(os.getpid())).touch()
        time.sleep(0.5)  # long enough for the other to find the folder missing
        return original(*args)

    original = token_cache._build
    monkeypatch.setattr(token_cache, "_build", slow_build)

    def build() -> tuple[str, list[int]]:
        cache = open_cache(
            corpus.entry("toy"), encode, OPTIONS, cache_dir=tmp_path / "cache", num_workers=1
        )
        return str(cache.folder), cache[2].input_ids.tolist()

    first, second = run_at_once(build)
    assert first == second
    assert len(list(builds.iterdir())) == 1


# --- too long -------------------------------------------------------------------------------------

LONG = [
    *GOOD[:2],
    record("two-rounds", "What?", "Yes. " * 20, "Why?", "No. " * 200),
    record("one-round", "What?", "No. " * 300),
]


def test_cut_and_over_length_are_counted_apart_with_their_ids(make_corpus, cached):
    cache = cached(make_corpus({"toy": LONG}, images=IMAGES))
    assert [cache[row].id for row in range(len(cache))] == ["r0", "r1", "two-rounds"]
    assert len(cache[2].label_spans) == 1
    assert cache.meta["records"] == 4
    assert (cache.meta["kept"], cache.meta["cut"]) == (3, 1)
    assert cache.meta["skipped"] == {"over_length": 1}
    assert [(note["id"], note["reason"]) for note in skipped(cache)] == [
        ("two-rounds", "cut"),
        ("one-round", "over_length"),
    ]
    assert "a pack holds 256 and 3" in skipped(cache)[1]["problem"]
    assert cache.counts[:, 0].max() <= 256


def test_drop_leaves_both_out(make_corpus, cached):
    cache = cached(make_corpus({"toy": LONG}, images=IMAGES), replace(OPTIONS, over_length="drop"))
    assert len(cache) == 2
    assert (cache.meta["cut"], cache.meta["skipped"]) == (0, {"over_length": 2})


# --- bad input ------------------------------------------------------------------------------------


BAD = {
    "missing_image": (record("bad", "<image>?", "Yes.", image="gone.png"), "Check image_root"),
    "image_count": (
        record("bad", "<image> or <image>?", "Yes.", image="a.png"),
        "Write one <image> for each image",
    ),
    "empty_conversation": (record("bad"), "Remove the record"),
    "empty_turn": (record("bad", "What?", " "), "Write its text"),
    "path_outside_root": (
        record("bad", "<image>?", "Yes.", image="../a.png"),
        "Give a path relative to image_root",
    ),
    "unknown_role": (
        {"id": "bad", "conversations": [{"from": "doctor", "value": "What?"}]},
        "Use one of system, user, human, assistant, gpt",
    ),
    "not_utf8": (b'{"id": "bad", "conversations": "\xff"}', "Save the file as UTF-8"),
    "not_json": (b'{"id": "bad", "conversations": [', "Each line must be one whole JSON object"),
    "not_an_object": (b'["bad"]', "an object a line"),
}
"""Reason -> a bad record, and its remedy."""


@pytest.mark.parametrize("reason", BAD)
def test_raise_names_a_bad_record_with_its_remedy_and_skip_counts_it(make_corpus, cached, reason):
    bad, remedy = BAD[reason]
    corpus = make_corpus({"toy": [*GOOD, bad]}, images=IMAGES)
    with pytest.raises(DataError) as caught:
        cached(corpus)
    assert caught.value.reason == reason
    assert caught.value.dataset == "toy"
    parsed = not isinstance(bad, bytes)
    assert ("bad" if parsed else "toy.jsonl, line 4") in (caught.value.record or "")
    message = str(caught.value)
    assert "'toy'" in message
    assert remedy in message
    # What is left is not where training would look.
    left = [path for path in corpus.folder.parent.glob("cache/tokens/*") if path.is_dir()]
    assert [path.suffix for path in left] == [".bad"]
    cache = cached(corpus, replace(OPTIONS, on_bad_sample="skip"))
    assert [cache[row].id for row in range(len(cache))] == ["r0", "r1", "r2"]
    assert (cache.meta["records"], cache.meta["kept"]) == (4, 3)
    assert cache.meta["skipped"] == {reason: 1}
    (note,) = skipped(cache)
    assert (note["reason"], bool(note["problem"])) == (reason, True)
    assert ("bad" if parsed else "line 4") in note["id"]


def test_the_bound_on_pixels_reaches_the_check_of_headers(corpus, cached):
    with pytest.raises(DataError) as caught:
        cached(corpus, replace(OPTIONS, max_pixels=30 * 40 - 1))
    assert caught.value.reasons == {"enormous_image": 2}


def test_image_without_an_image_root_is_found(make_corpus, cached):
    corpus = make_corpus({"toy": GOOD}, images=IMAGES, fields={"toy": {"image_root": None}})
    with pytest.raises(DataError, match=r"(?s)r0 \(toy.jsonl, line 1\).*Add image_root") as caught:
        cached(corpus)
    assert caught.value.reason == "no_image_root"
    cache = cached(corpus, replace(OPTIONS, on_bad_sample="skip"))
    assert [cache[row].id for row in range(len(cache))] == ["r1"]


def test_unchecked_images_may_come_later(make_corpus, cached):
    corpus = make_corpus({"toy": [BAD["missing_image"][0]]})
    cache = cached(corpus, replace(OPTIONS, check_images="none"))
    assert (cache[0].input_ids == IMAGE_TOKEN_INDEX).sum() == 1


def test_a_whole_chunk_of_bad_records_is_skipped(make_corpus, cached):
    records = many_records(600)
    assert tokenize_records.RECORDS_A_CHUNK == 512
    corpus = make_corpus({"toy": [BAD["empty_turn"][0]] * 512 + records})
    cache = cached(corpus, replace(OPTIONS, on_bad_sample="skip"))
    assert cache.meta["skipped"] == {"empty_turn": 512}
    assert [cache[row].id for row in (0, 511, 512, 599)] == ["r0", "r511", "r512", "r599"]


def test_a_dataset_without_a_usable_record_is_an_error(make_corpus, cached):
    corpus = make_corpus({"toy": [BAD["empty_turn"][0], BAD["not_json"][0]]})
    with pytest.raises(DataError, match=r"none of its 2 records can be used.*toy\.jsonl") as caught:
        cached(corpus, replace(OPTIONS, on_bad_sample="skip"))
    assert "empty_turn" in str(caught.value)


def test_several_annotation_files_follow_each_other(make_corpus, cached):
    corpus = make_corpus(
        {"toy": GOOD[:1], "more": GOOD[1:]},
        images=IMAGES,
        fields={"toy": {"annotations": ["more.jsonl", "toy.jsonl"]}},
    )
    cache = cached(corpus)
    assert [cache[row].id for row in range(len(cache))] == ["r1", "r2", "r0"]


@pytest.mark.parametrize(
    "change", [{"over_length": "trim"}, {"on_bad_sample": "replace"}, {"check_images": "all"}]
)
def test_unknown_options_are_refused(change):
    (name,) = change
    with pytest.raises(GMAIError, match=f"{name} must be one of"):
        replace(OPTIONS, **change)

"""Benchmarks in mmengine's terms: which rank asks what, and numbers by hand."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import benchmarks
from gmai_xtuner.train.benchmarks import BenchmarkQuestions, BenchmarkScore, QuestionBatches
from gmai_xtuner.train.validation import HeldOutLoop
from tests.evaluate.sets import write_omnimedvqa, write_pmc_vqa, write_vqa_rad


@pytest.fixture
def folder(tmp_path):
    write_vqa_rad(tmp_path / "VQA-RAD", questions=10)
    write_pmc_vqa(tmp_path / "PMC-VQA")
    return tmp_path


def test_a_folder_or_names_with_options(folder):
    found = BenchmarkQuestions(str(folder))
    assert [(one.name, one.protocol.name, len(one.questions)) for one in found.entries] == [
        ("vqa_rad_test", "closed-251", 5),
        ("pmc_vqa_test_clean", "clean-2000", 4),
    ]
    named = BenchmarkQuestions(
        {
            "full": {
                "benchmark": "vqa_rad",
                "data": str(folder),
                "protocol": "full-451",
                "limit": 7,
            },
            "pmc_vqa": {"data": str(folder / "PMC-VQA")},
        },
        limit=3,
    )
    assert [(one.name, len(one.questions)) for one in named.entries] == [
        ("full", 3),
        ("pmc_vqa", 3),
    ]
    asked = named[4]
    assert asked.prompt.turns[0] == Turn(
        "user", "<image>\n" + named.entries[1].protocol.prompt(named.entries[1].questions[1])
    )
    assert [picture.size for picture in asked.prompt.images] == [(32, 24)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/nowhere", "no folder of benchmarks at '/nowhere': name it in the environment variable"),
        ({}, "no benchmark is named"),
        (
            {"vqa_rad": {"folder": "x"}},
            "takes benchmark, data, variant, protocol, limit and needs data",
        ),
        ({"imagenet": {"data": "x"}}, "imagenet"),
    ],
)
def test_what_is_wrong_is_told_at_the_start(given, told):
    with pytest.raises(GMAIError, match=told):
        BenchmarkQuestions(given)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_asks_equally_often_and_every_question_is_asked(folder, monkeypatch, world_size):
    questions = BenchmarkQuestions(str(folder))
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(benchmarks, "get_dist_info", lambda rank=rank: (rank, world_size))
        batches = QuestionBatches(SimpleNamespace(dataset=questions), 2)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    for batch in (batch for batches in ranks for batch in batches):
        assert len({questions.rows[index][0] for index in batch}) == 1
    asked = Counter(index for batches in ranks for batch in batches for index in batch)
    assert set(asked) == set(range(9))
    assert sum(asked.values()) - 9 < 2 * world_size


def metric_of(questions, **options):
    metric = BenchmarkScore(**options)
    metric.dataset_meta = questions.metainfo
    return metric


def test_numbers_by_hand_and_a_question_asked_twice_counts_once(folder, tmp_path):
    questions = BenchmarkQuestions(str(folder))
    items = [questions[index] for index in range(9)]
    # VQA-RAD: gold Yes, No, Yes, No, Yes; PMC-VQA: A, B, C, D.
    texts = ["Yes", "Yes", "Yes", "No", "hm", "A", "(B)", "D", None]
    metric = metric_of(questions, save=str(tmp_path / "answers"))
    metric.process(items, texts)
    metric.process(items[:2], texts[:2])
    assert metric.evaluate(9) == {
        "test/vqa_rad_test/accuracy": 3 / 5,
        "test/vqa_rad_test/unparsed": 1 / 5,
        "test/pmc_vqa_test_clean/accuracy": 2 / 3,
        "test/pmc_vqa_test_clean/unparsed": 0.0,
        "test/pmc_vqa_test_clean/unanswered": 1.0,
    }
    assert metric.results == []
    lines = (tmp_path / "answers" / "vqa_rad_test.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[1])["value"] == 0.0


def test_further_averages_have_their_names(tmp_path):
    questions = BenchmarkQuestions(
        {"omni": {"benchmark": "omnimedvqa", "data": str(write_omnimedvqa(tmp_path))}}
    )
    metric = metric_of(questions, prefix="val")
    metric.process([questions[index] for index in range(10)], ["A"] * 10)
    numbers = metric.evaluate(10)
    # Gold letters A, B, C, D, A, B, C, D, A, B: three of ten; types hold two questions each.
    assert numbers["val/omni/accuracy"] == 0.3
    assert numbers["val/omni/macro_over_question_type"] == pytest.approx(0.3)


def test_a_damaged_picture_is_counted_and_does_not_stop_the_training(folder):
    questions = BenchmarkQuestions(str(folder))
    (folder / "PMC-VQA" / "images" / "PMC0.jpg").write_bytes(b"damaged")
    assert questions[5].prompt is None
    metric = metric_of(questions)
    metric.process([questions[5]], [None])
    assert metric.evaluate(9)["test/pmc_vqa_test_clean/unanswered"] == 4.0


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (None, [500, 1000, 1500, 2000, 2200]),
        (1000, [1000, 2000, 2200]),
        (1500, [1500, 2200]),
    ],
)
def test_benchmarks_are_asked_at_the_validation_after_each_multiple_and_at_the_end(
    interval, expected
):
    asked = []
    for step in (500, 1000, 1500, 2000, 2200):
        loop = SimpleNamespace(iter=4 * step, max_iters=8800, step=step, val_interval=500)
        held_out = SimpleNamespace(
            benchmark_interval=interval, runner=SimpleNamespace(train_loop=loop)
        )
        if HeldOutLoop._benchmarks_due(held_out):
            asked.append(step)
    assert asked == expected

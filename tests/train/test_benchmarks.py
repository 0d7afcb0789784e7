# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in mmengine's terms: which rank asks what, and numbers by hand."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from mmengine.evaluator import Evaluator

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.generate import Answered
from gmai_xtuner.train.benchmarks import (
    BenchmarkQuestions,
    BenchmarkScore,
    ask_benchmarks,
    jobs_in_step,
)
from gmai_xtuner.train.validation import HeldOutLoop
from tests.evaluate.sets import write_omnimedvqa, write_pmc_vqa, write_vqa_rad


@pytest.fixture
def folder(tmp_path):
    write_vqa_rad(tmp_path / "VQA-RAD", questions=10)
    write_pmc_vqa(tmp_path / "PMC-VQA")
    return tmp_path


def test_a_folder_or_names_with_options(folder):
    found = BenchmarkQuestions(str(folder))
    assert [(name, one.name, len(one.questions)) for name, one in found.asked.items()] == [
        ("pmc_vqa_test_clean", "clean-2000/2", 4),
        ("vqa_rad_test", "closed-251/2", 5),
    ]
    assert len(found) == 9
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
    asked = {name: (one.name, len(one.questions)) for name, one in named.asked.items()}
    assert asked == {"full": ("full-451/2", 3), "pmc_vqa": ("clean-2000/2", 3)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/nowhere", "no folder of benchmarks at '/nowhere': name it in the environment variable"),
        ({}, "no folder of benchmarks at"),
        (
            {"vqa_rad": {"folder": "x"}},
            "takes benchmark, data, variant, protocol, limit, max_new_tokens and needs data",
        ),
        ({"imagenet": {"data": "x"}}, "imagenet"),
    ],
)
def test_what_is_wrong_is_told_at_the_start(given, told):
    with pytest.raises(GMAIError, match=told):
        BenchmarkQuestions(given)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_asks_equally_often_and_every_question_is_asked(folder, world_size):
    for asked in BenchmarkQuestions(str(folder)).asked.values():
        jobs = [job for _, job in asked.jobs()]
        ranks = [jobs_in_step(jobs, rank, world_size) for rank in range(world_size)]
        assert len({len(mine) for mine in ranks}) == 1
        times = Counter(job.id for mine in ranks for job in mine)
        assert set(times) == {job.id for job in jobs}
        assert sum(times.values()) - len(jobs) < world_size


class FakePredictor:
    """Answers by a function of the prompt's text; counts what it was asked."""

    def __init__(self, say):
        self.say, self.batches = say, []

    context_length = 1

    def num_tokens(self, prompt):
        return int(self.say(prompt.turns[0].text) is None)

    def answer_batch(self, prompts, *, max_new_tokens, synced_gpus):
        self.batches.append(len(prompts))
        texts = [one.turns[0].text for one in prompts]
        said = ["" if text == "?" else self.say(text) for text in texts]
        return [Answered(text.removesuffix("..."), "..." in text) for text in said]


def numbers(questions, say, **options):
    evaluator = Evaluator(BenchmarkScore(**options))
    predictor = FakePredictor(say)
    found = ask_benchmarks(questions, evaluator, predictor, batch_size=2, readers=2)
    assert evaluator.metrics[0].results == []
    assert {name.partition("/")[2] for name in found} <= questions.numbers()
    return found, predictor.batches


def test_numbers_by_hand(folder, tmp_path):
    # VQA-RAD: gold Yes, No, Yes, No, Yes; PMC-VQA: A, B, C, D.
    answers = {
        **{f"finding {2 * n} ": text for n, text in enumerate(["Yes", "Yes", "Yes", "No", "hm"])},
        **{f"figure {n}?": text for n, text in enumerate(["A", "(B)", "C...", None])},
    }

    def say(text):
        assert text.startswith("<image>\n")
        return next(answer for words, answer in answers.items() if words in text)

    found, batches = numbers(BenchmarkQuestions(str(folder)), say, save=str(tmp_path / "answers"))
    assert found == {
        "test/vqa_rad_test/accuracy": 3 / 5,
        "test/vqa_rad_test/unparsed": 1 / 5,
        "test/pmc_vqa_test_clean/accuracy": 1.0,
        "test/pmc_vqa_test_clean/unparsed": 0.0,
        "test/pmc_vqa_test_clean/unanswered": 2.0,  # one was cut, one could not be asked
    }
    assert batches == [2, 2, 2, 2, 1]
    lines = (tmp_path / "answers" / "vqa_rad_test.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[1])["value"] == 0.0


def test_further_averages_have_their_names(tmp_path):
    questions = BenchmarkQuestions(
        {"omni": {"benchmark": "omnimedvqa", "data": str(write_omnimedvqa(tmp_path))}}
    )
    found, _ = numbers(questions, lambda text: "A", prefix="val")
    # Gold letters A, B, C, D, A, B, C, D, A, B: three of ten; types hold two questions each.
    assert found["val/omni/accuracy"] == 0.3
    assert found["val/omni/macro_over_question_type"] == pytest.approx(0.3)


def test_a_damaged_image_is_counted_and_does_not_stop_the_training(folder):
    questions = BenchmarkQuestions(str(folder))
    (folder / "PMC-VQA" / "images" / "PMC0.jpg").write_bytes(b"damaged")
    found, batches = numbers(questions, lambda text: "A")
    assert found["test/pmc_vqa_test_clean/unanswered"] == 1.0
    assert batches == [2, 2, 2, 2, 1]  # the rank stays in step with the others


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(None, [500, 1000, 1500, 2000, 2200]), (1000, [1000, 2000, 2200]), (1500, [1500, 2200])],
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

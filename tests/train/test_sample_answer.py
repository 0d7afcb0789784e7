# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.generate import Answered, Predictor
from gmai_xtuner.train import sample_answer
from gmai_xtuner.train.hooks import ProgressHook
from gmai_xtuner.train.sample_answer import SampleAnswerHook
from tests.tables import tables
from tests.toy import record

TABLES = tables(__file__)


@pytest.fixture
def model(tiny_model) -> GMAILLaVAModel:
    return tiny_model.train()


@pytest.fixture
def corpus(make_corpus):
    def records(name: str) -> list[dict]:
        return [
            record(f"t{name}", "No picture?", "None."),
            *(
                record(
                    f"{name}{number}", f"<image>\nWhat is {name}{number}?", f"A {name}.", "Sure?",
                    "Yes.", image=f"{number}.png",
                )
                for number in range(10)
            ),
        ]  # fmt: skip

    images = [f"{number}.png" for number in range(10)]
    return make_corpus({"cat": records("cat"), "dog": records("dog")}, images=images)


@pytest.fixture
def runner(build, corpus, model):
    """As much of a runner as the hook uses; ``shown`` is what reached log and TensorBoard."""
    dataset = build(corpus, held_out=0.4)
    shown = SimpleNamespace(log=[], warnings=[], texts=[], images=[])
    writer = SimpleNamespace(
        add_text=lambda tag, text, global_step: shown.texts.append((tag, text, global_step))
    )
    backends = {
        "local": SimpleNamespace(experiment=object()),
        "tb": SimpleNamespace(experiment=writer),
    }
    return SimpleNamespace(
        iter=0,
        max_iters=6,
        hooks=[ProgressHook()],
        model=SimpleNamespace(module=model, train=model.train, eval=model.eval),
        train_loop=SimpleNamespace(
            dataloader=SimpleNamespace(dataset=dataset), stop_training=False
        ),
        logger=SimpleNamespace(info=shown.log.append, warning=shown.warnings.append),
        visualizer=SimpleNamespace(
            add_image=lambda name, image, step: shown.images.append((name, image.shape, step)),
            _vis_backends=backends,
        ),
        shown=shown,
    )


def go(hook: SampleAnswerHook, runner) -> None:
    """Three steps of two micro-batches."""
    hook.before_train(runner)
    for runner.train_loop.step, runner.iter in ((1, 1), (2, 3), (3, 5)):
        hook.after_step(runner)


def test_only_the_first_rank_opens_a_visual_backend(runner, monkeypatch):
    asked = []
    answer = lambda *args, **_: asked.append(args) or [Answered("x", False)]  # noqa: E731
    monkeypatch.setattr(Predictor, "answer_batch", answer)
    monkeypatch.setattr(sample_answer, "is_main_process", lambda: False)
    runner.visualizer._vis_backends = None  # looking into it raises
    go(SampleAnswerHook(interval=2, max_new_tokens=4), runner)
    assert len(asked) == 2  # the other ranks take part in answering
    assert runner.shown.log == []


def test_first_held_out_conversations_with_an_image_are_asked(runner):
    hook = SampleAnswerHook(interval=2, count=2, max_new_tokens=4)
    go(hook, runner)
    part = runner.train_loop.dataloader.dataset.held_out_part()
    first = [
        next(
            part.caches[number][row].id
            for dataset, row in part.plan.samples.tolist()
            if dataset == number and part.caches[number][row].images
        )
        for number in (0, 1)
    ]
    assert [sample.name for sample in hook._ready] == [f"cat/{first[0]}", f"dog/{first[1]}"]
    assert [sample.question for sample in hook._ready] == [f"What is {name}?" for name in first]
    assert [sample.reference for sample in hook._ready] == ["A cat.", "A dog."]
    # After the second step and at the end. Each image is shown once.
    assert [line.split(":")[0] for line in runner.shown.log] == [
        f"Sample answer at iteration {step}, {animal}/{name}"
        for step in (4, 6)
        for animal, name in zip(("cat", "dog"), first, strict=True)
    ]
    assert [name for name, *_ in runner.shown.images] == [
        f"sample_answer/cat/{first[0]}/0",
        f"sample_answer/dog/{first[1]}/0",
    ]
    tag, text, step = runner.shown.texts[0]
    assert (tag, step) == (f"sample_answer/cat/{first[0]}", 4)
    assert text.startswith(f"question: What is {first[0]}?\n\nreference: A cat.\n\nanswer: ")


def test_answer_is_what_the_predictor_would_give(runner, model, corpus):
    image = str(corpus.images / "3.png")
    hook = SampleAnswerHook(samples=[{"image": image, "question": "What is it?"}], max_new_tokens=5)
    go(hook, runner)
    dataset = runner.train_loop.dataloader.dataset
    predictor = Predictor(
        model, tokenizer=dataset.tokenizer, template=dataset.template, transform=dataset.transform
    )
    expected = predictor.answer("What is it?", [image], max_new_tokens=5)
    (line,) = runner.shown.log  # at the end of the run
    assert line.splitlines() == [
        "Sample answer at iteration 6, 3.png:",
        "  question: What is it?",
        f"  answer: {expected}",
    ]


def test_training_does_not_notice(runner, model, monkeypatch):
    def draw_and_answer(self, *_, **__) -> list[Answered]:
        assert not model.training
        assert not any(module.training for module in model.modules())
        torch.rand(3), np.random.rand(3)
        return [Answered("", False)]

    monkeypatch.setattr(Predictor, "answer_batch", draw_and_answer)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(0)
    np.random.seed(0)
    go(SampleAnswerHook(interval=1), runner)
    assert len(runner.shown.log) == 3
    assert "is empty: this model has not learnt to answer" in runner.shown.warnings[0]
    assert all(module.training for module in model.llm.modules())
    assert model.llm.config.use_cache is False
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])


@pytest.mark.parametrize(
    ("answer", "nothing"),
    [
        ("", True),
        (" \n", True),
        ("isThis isThis isThis isThis isThis man", True),
        ("病灶病灶病灶病灶病灶", True),
        ("A chest X-ray. A chest X-ray.", False),
        ("The mass is 100000000 cells wide, in 4 of 4 slices.", False),
        ("Yes.", False),
    ],
)
def test_an_answer_that_shows_nothing_learnt_is_known(answer, nothing):
    assert sample_answer.says_nothing(answer) is nothing


def test_weights_can_be_trained_after_an_answer(runner, model, monkeypatch):
    modes = []
    generate = model.llm.generate

    def watched(**arguments):
        # What ZeRO-3 gathers in inference mode stays an inference tensor, which backward refuses.
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return generate(**arguments)

    monkeypatch.setattr(model.llm, "generate", watched)
    go(SampleAnswerHook(interval=6, max_new_tokens=2), runner)
    assert modes == [(False, False)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_answering_is_no_training_time(runner, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(ProgressHook, "before_val", lambda *_: calls.append("pause"))
    monkeypatch.setattr(ProgressHook, "after_val", lambda *_: calls.append("go on"))
    go(SampleAnswerHook(interval=6, max_new_tokens=2), runner)
    assert calls == ["pause", "go on"]


def test_a_run_that_is_asked_to_stop_does_not_answer_first(runner):
    hook = SampleAnswerHook(interval=2)
    runner.train_loop.stop_training = True
    go(hook, runner)
    assert runner.shown.log == []


def test_interval_zero_does_nothing(runner):
    go(SampleAnswerHook(interval=0), runner)
    assert runner.shown.log == runner.shown.images == []


def test_nothing_held_out_is_told_once(runner):
    runner.train_loop.dataloader.dataset.plan.held_out = 0.0
    go(SampleAnswerHook(interval=2), runner)
    (line,) = runner.shown.log
    assert "No sample answers: no held-out conversation has an image" in line


@pytest.mark.parametrize(
    ("sample", "message"), TABLES["samples_that_cannot_be_asked_stop_the_run_at_its_start"]
)
def test_samples_that_cannot_be_asked_stop_the_run_at_its_start(runner, sample, message):
    with pytest.raises(GMAIError, match=message):
        SampleAnswerHook(samples=[sample]).before_train(runner)


def test_images_stay_open_for_the_whole_run(runner, corpus):
    path = corpus.images / "own.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(path)
    hook = SampleAnswerHook(
        samples=[{"image": str(path), "question": "Which colour?"}], max_new_tokens=2
    )
    hook.before_train(runner)
    path.unlink()
    runner.iter = 5
    runner.train_loop.step = 3
    hook.after_step(runner)
    assert len(runner.shown.log) == 1

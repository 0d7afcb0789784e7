# SPDX-License-Identifier: Apache-2.0

"""In training, what can't be asked keeps a rank in step with the others and changes no answer."""

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.generate import Predictor, Prompt, user_turn
from gmai_xtuner.loading import load_model
from gmai_xtuner.train.benchmarks import answers_in_step, bare_model


@pytest.fixture(scope="module")
def predictor(export) -> Predictor:
    return load_model(export, device="cpu")


def test_answers_are_those_of_one_prompt_at_a_time(predictor, monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    prompts = [
        Prompt((user_turn("What is shown?", 1),), (picture,)),
        Prompt((user_turn("Is it CT?", 0),)),
        Prompt((user_turn("long " * 400, 0),)),
    ]
    alone = [predictor.generate(one.turns, one.images, max_new_tokens=12) for one in prompts]
    assert len(set(alone)) == 3
    asked = answers_in_step(predictor, [*prompts, None], max_new_tokens=12, synced=False)
    said = [one and one.text for one in asked]
    assert said == [*alone, None]
    # With room for fewer tokens the third can't be asked; no rank may raise alone.
    monkeypatch.setattr(type(predictor), "context_length", 300)
    asked = answers_in_step(predictor, prompts, max_new_tokens=12, synced=False)
    assert [one and one.text for one in asked] == [*alone[:2], None]
    ends = predictor.answer_batch(prompts[:2], max_new_tokens=12)
    assert asked[:2] == ends  # the same way as outside of training, cut answers too


@pytest.mark.parametrize("most", [2, 3])
def test_a_long_neighbour_cuts_no_answer_and_ranks_stay_in_step(predictor, monkeypatch, most):
    """Another rank has ``most`` groups, this one two: it generates as often."""
    from gmai_xtuner import generate as generating

    prompts = [Prompt((user_turn("Is it CT?", 0),)), Prompt((user_turn("long " * 100, 0),))]
    alone = [predictor.generate(one.turns, (), max_new_tokens=12) for one in prompts]
    room = predictor.num_tokens(prompts[1]) + 2
    monkeypatch.setattr(type(predictor), "context_length", room)
    cut = predictor.generate(prompts[1].turns, (), max_new_tokens=2)
    assert cut != alone[1]
    calls, generate = [], predictor.model.llm.generate
    monkeypatch.setattr(
        predictor.model.llm,
        "generate",
        lambda **given: calls.append(given) or generate(**given | {"synced_gpus": False}),
    )
    monkeypatch.setattr(generating, "all_gather_object", lambda mine: [mine, most])
    asked = answers_in_step(predictor, prompts, max_new_tokens=12, synced=True)
    assert [one and one.text for one in asked] == [alone[0], cut]
    assert [one["max_new_tokens"] for one in calls] == [12, 2, 1][:most]


def test_the_model_is_found_within_what_is_put_around_it(predictor):
    class Around:
        def __init__(self, module):
            self.module = module

    assert bare_model(Around(Around(predictor.model))) is predictor.model

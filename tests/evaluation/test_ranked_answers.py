"""In training, what can't be asked keeps a rank in step with the others and changes no answer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.engine.benchmarks import RankedPredictor, bare_model
from gmai_xtuner.inference import Prompt, user_turn
from gmai_xtuner.loading import load_model


@pytest.fixture(scope="module")
def predictor(export) -> RankedPredictor:
    loaded = load_model(export, device="cpu")
    return RankedPredictor(
        loaded.model,
        tokenizer=loaded.tokenizer,
        template=loaded.encoder.template,
        transform=loaded.transform,
    )


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
    asked = predictor.answers([*prompts, None], max_new_tokens=12, synced=False)
    assert asked == [*alone, None]
    # With room for fewer tokens the third can't be asked; no rank may raise alone.
    monkeypatch.setattr(type(predictor), "context_length", 300)
    assert predictor.answers(prompts, max_new_tokens=12, synced=False) == [*alone[:2], None]


def test_the_model_is_found_within_what_is_put_around_it(predictor):
    class Around:
        def __init__(self, module):
            self.module = module

    assert bare_model(Around(Around(predictor.model))) is predictor.model

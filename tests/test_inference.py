# SPDX-License-Identifier: Apache-2.0

"""One answer, several together, and an answer in pieces are the same answer."""

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.generate import Prompt, PromptTooLong, Sampling, user_turn

LENGTH = 24


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Of different lengths: without image, with one, with two, with several turns, in Chinese."""
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 40, 3), dtype=np.uint8))
        for n in range(3)
    ]
    return [
        Prompt((user_turn("What is shown?", 1),), (pictures[0],)),
        Prompt((user_turn("Is it CT?", 0),)),
        Prompt((user_turn("Compare <image> with <image>, please.", 2),), tuple(pictures[1:])),
        Prompt(
            (
                Turn("system", "You are a radiologist."),
                user_turn("图中显示什么？", 1),
                Turn("assistant", "胸部X光片。"),
                user_turn("有气胸吗？", 0),
            ),
            (pictures[2],),
        ),
    ]


def texts(predictor, prompts, **options):
    return [one.text for one in predictor.answer_batch(prompts, **options)]


def test_a_batch_gives_the_answers_of_one_prompt_at_a_time(predictor, prompts):
    alone = [
        predictor.generate(prompt.turns, prompt.images, max_new_tokens=LENGTH) for prompt in prompts
    ]
    assert len(set(alone)) > 1, "the model must tell the prompts apart, or this shows nothing"
    assert texts(predictor, prompts, max_new_tokens=LENGTH) == alone
    assert texts(predictor, prompts[::-1], max_new_tokens=LENGTH) == alone[::-1]


def test_an_answer_in_pieces_is_the_whole_answer(predictor, prompts):
    for prompt in prompts:
        pieces = list(predictor.stream(prompt.turns, prompt.images, max_new_tokens=LENGTH))
        whole = predictor.generate(prompt.turns, prompt.images, max_new_tokens=LENGTH)
        assert "".join(pieces) == whole
        assert len(pieces) > 1


def test_a_closed_stream_stops_the_model(predictor, prompts, monkeypatch):
    steps = []
    original = predictor.model.llm.forward
    monkeypatch.setattr(
        predictor.model.llm, "forward", lambda *a, **k: steps.append(1) or original(*a, **k)
    )
    pieces = predictor.stream(prompts[0].turns, prompts[0].images, max_new_tokens=10_000)
    next(pieces)
    pieces.close()
    made = len(steps)
    assert made < 1_000
    list(predictor.stream(prompts[1].turns, (), max_new_tokens=1))
    assert len(steps) == made + 1, "the closed stream went on"


def test_an_error_while_streaming_is_raised_where_it_is_read(predictor, prompts, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor.model.llm, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.stream(prompts[0].turns, prompts[0].images, max_new_tokens=2))


def test_sampling_repeats_with_a_seed(predictor, prompts):
    def ask(seed):
        return predictor.generate(
            prompts[0].turns,
            prompts[0].images,
            max_new_tokens=LENGTH,
            sampling=Sampling(temperature=1.5, seed=seed),
        )

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_marks_and_images_must_agree(predictor):
    with pytest.raises(ValueError, match="2 <image> marks in the text, but 1 images"):
        predictor.answer("<image> or <image>?", [Image.new("RGB", (8, 8))])
    with pytest.raises(ValueError, match="0 <image> marks in the text, but 1 images"):
        predictor.stream((Turn("user", "x"),), [Image.new("RGB", (8, 8))])


def test_no_prompt_gives_no_answer(predictor):
    assert texts(predictor, []) == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1, 1e-38, 101, float("nan"))),
        ("top_p", (0, 1e-320, 1.1)),
        ("repetition_penalty", (0, 1e-40, float("inf"))),
        ("seed", (2**63,)),
    ],
)
def test_sampling_with_which_no_model_can_compute_is_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be"):
            Sampling(**{name: value})


def test_a_stream_counts_tokens_and_says_whether_it_was_cut(predictor, prompts, monkeypatch):
    stream = predictor.stream(prompts[0].turns, prompts[0].images, max_new_tokens=5)
    assert stream.prompt_tokens == predictor.num_tokens(prompts[0])
    list(stream)
    assert (stream.new_tokens, stream.is_cut) == (5, True)
    ids = predictor.tokenizer(
        predictor.answer("Is it CT?", max_new_tokens=1), add_special_tokens=False
    )
    monkeypatch.setattr(predictor, "stop_ids", [ids.input_ids[0]])
    stream = predictor.stream((Turn("user", "Is it CT?"),), (), max_new_tokens=5)
    list(stream)
    assert (stream.new_tokens, stream.is_cut) == (1, False)


def test_a_prompt_fits_into_the_positions_of_the_model(predictor, prompts, monkeypatch):
    text, picture = prompts[1], prompts[0]
    assert predictor.context_length == 32768
    length = predictor.num_tokens(text)
    assert predictor.num_tokens(picture) > 64, "image tokens are counted"
    monkeypatch.setattr(predictor.model.llm.config, "max_position_embeddings", length + 2)
    stream = predictor.stream(text.turns, (), max_new_tokens=10)
    list(stream)
    assert (stream.new_tokens, stream.is_cut) == (2, True)
    monkeypatch.setattr(predictor.model.llm.config, "max_position_embeddings", length)
    with pytest.raises(PromptTooLong, match=rf"{length} tokens.*{length} positions"):
        predictor.stream(text.turns, (), max_new_tokens=10)
    with pytest.raises(PromptTooLong):
        texts(predictor, [text])


def test_a_long_neighbour_cuts_no_answer(predictor, prompts, monkeypatch):
    """Of two prompts in a batch the longer has room for two tokens, the other for all of them."""
    short, long = prompts[1], prompts[2]
    alone = predictor.generate(short.turns, short.images, max_new_tokens=LENGTH)
    limit = predictor.num_tokens(long) + 2
    monkeypatch.setattr(predictor.model.llm.config, "max_position_embeddings", limit)
    two_tokens = predictor.generate(long.turns, long.images, max_new_tokens=LENGTH)
    assert two_tokens == predictor.generate(long.turns, long.images, max_new_tokens=2)
    asked = texts(predictor, [short, long, short], max_new_tokens=LENGTH)
    assert asked == [alone, two_tokens, alone]


def test_a_token_that_has_no_text_does_not_end_a_stream(predictor, prompts, monkeypatch):
    """The model's vocabulary may be larger than the tokenizer's."""
    monkeypatch.setattr(type(predictor.tokenizer), "convert_ids_to_tokens", lambda *_: None)
    pieces = list(predictor.stream(prompts[0].turns, prompts[0].images, max_new_tokens=4))
    assert "".join(pieces) == predictor.generate(
        prompts[0].turns, prompts[0].images, max_new_tokens=4
    )

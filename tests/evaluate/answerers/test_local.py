# SPDX-License-Identifier: Apache-2.0

"""Batches give the answers of one question at a time, for our exports and for transformers' own models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gmai_xtuner.core.errors import EvaluationError, GMAIError, ModelLoadError
from gmai_xtuner.evaluate.answerers import ModelOptions, make_answerer
from gmai_xtuner.evaluate.answerers.local import LocalAnswerer, batches_of
from gmai_xtuner.evaluate.store import Job, split_at_images
from gmai_xtuner.generate import Answered


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> list[Job]:
    """Of many lengths, without image, with one and with two; one image stands in bytes."""
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        files.append(folder / f"{number}.png")
    made = []
    for number in range(11):
        images = [(), (files[number % 4],), (files[0], files[number % 4].read_bytes())][number % 3]
        words = " ".join(["What is shown here?", "是什么？"][number % 2] for _ in range(1 + number))
        marks = "Compare <image> with <image>. " if len(images) == 2 else ""
        made.append(Job(f"q{number}", marks + words, tuple(images), 12, "p/1"))
    return made


def answers(answerer, jobs, **world):
    return {one.job.id: one.text for batch in answerer.answers(jobs, **world) for one in batch}


def test_our_export_answers_in_batches_as_alone(export, jobs, tmp_path):
    def load(batch_size):
        options = ModelOptions(model=str(export), batch_size=batch_size, device="cpu")
        return make_answerer(options, cache=tmp_path)

    alone = answers(load(1), jobs)
    assert set(alone) == {job.id for job in jobs}
    assert len(set(alone.values())) > 4, "the model must tell the questions apart"
    together = load(4)
    assert answers(together, jobs) == alone
    assert together.generation == {"decoding": "greedy", "precision": "float32"}
    halves = [answers(together, jobs, rank=rank, world_size=2) for rank in range(2)]
    assert halves[0] | halves[1] == alone
    assert set(halves[0]).isdisjoint(halves[1])
    assert min(map(len, halves)) >= 3


@pytest.fixture(scope="module")
def llava(tiny_bases, tokenizer, tmp_path_factory):
    """A tiny LLaVA in transformers' own layout, with a processor and a chat template."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-llava"
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.eos_token,
        model_input_names=["input_ids", "attention_mask"],
    )
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # else it says the same whatever it sees
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    ).save_pretrained(folder)
    return folder


def test_a_transformers_model_answers_in_batches_as_alone(llava, jobs, tmp_path):
    def load(batch_size):
        options = ModelOptions(model=str(llava), batch_size=batch_size, device="cpu")
        return make_answerer(options, cache=tmp_path)

    alone = answers(load(1), jobs)
    assert len(set(alone.values())) > 4, "the model must tell the questions apart"
    together = load(4)
    assert answers(together, jobs) == alone
    assert together.generation["processor"] == "LlavaProcessor"
    assert together.name == "tiny-llava"


def test_a_model_without_chat_template_is_refused(llava, tmp_path):
    import shutil

    copy = shutil.copytree(llava, tmp_path / "copy")
    (copy / "chat_template.json").unlink(missing_ok=True)
    file = copy / "processor_config.json"
    content = json.loads(file.read_text())
    content.pop("chat_template", None)
    file.write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match="has no chat template"):
        make_answerer(ModelOptions(model=str(copy), device="cpu"), cache=tmp_path)


def test_what_is_no_model_is_told(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(
        GMAIError, match="neither an export of this project nor an image-text model"
    ):
        make_answerer(ModelOptions(model=str(tmp_path / "x"), device="cpu"), cache=tmp_path)


class Counting(LocalAnswerer):
    """Notes its batches; raises what ``fails`` says."""

    def __init__(self, batch_size, fails=lambda prompts: None):
        super().__init__(name="c", model="sha256:c", generation={}, batch_size=batch_size)
        self.batches, self.fails = [], fails

    def generate(self, jobs, pictures, max_new_tokens):
        prompts = [job.prompt for job in jobs]
        self.batches.append((len(prompts), len(pictures[0]), max_new_tokens))
        error = self.fails(prompts)
        if error is not None:
            raise error
        return [Answered(prompt.upper(), False) for prompt in prompts]


def test_a_batch_that_does_not_fit_into_memory_is_halved_for_good():
    def fails(prompts):
        return torch.cuda.OutOfMemoryError() if len(prompts) > 2 else None

    answerer = Counting(8, fails)
    made = [Job(f"q{n}", f"q{n}", (), 4, "p/1") for n in range(16)]
    assert answers(answerer, made) == {f"q{n}": f"Q{n}" for n in range(16)}
    assert [size for size, _, _ in answerer.batches[:4]] == [8, 4, 2, 2]
    assert max(size for size, _, _ in answerer.batches[2:]) == 2


def test_a_question_that_cannot_be_asked_does_not_stop_the_others():
    def fails(prompts):
        return ValueError("too long") if "q3" in prompts else None

    made = [Job(f"q{n}", f"q{n}", (), 4, "p/1") for n in range(6)]
    given = {one.job.id: one for batch in Counting(6, fails).answers(made) for one in batch}
    assert (given["q3"].text, given["q3"].problem) == (None, "cannot_be_asked")
    assert sum(one.text is not None for one in given.values()) == 5


def test_a_model_that_can_be_asked_nothing_stops_at_once():
    answerer = Counting(4, lambda prompts: ValueError("no such argument"))
    made = [Job(f"q{n}", f"q{n}", (), 4, "p/1") for n in range(40)]
    with pytest.raises(EvaluationError, match=r"none of the first 8 questions.*no such argument"):
        answers(answerer, made)


def test_an_unreadable_image_is_counted_and_the_batch_goes_on(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    made = [Job(n, n, (tmp_path / f"{n}.png",), 4, "p/1") for n in ("bad", "good", "missing")]
    given = {one.job.id: one for batch in Counting(4).answers(made) for one in batch}
    assert {name: (one.text, one.problem) for name, one in given.items()} == {
        "good": ("GOOD", ""),
        "bad": (None, "unsupported_image"),
        "missing": (None, "missing_image"),
    }


def test_batches_hold_equally_many_images_and_one_longest_answer():
    made = [Job(f"q{n}", "x" * n, (b"",) * (n % 3), (8, 16)[n % 2], "p/1") for n in range(30)]
    batches = batches_of(made, 4)
    assert sorted(job.id for batch in batches for job in batch) == sorted(job.id for job in made)
    for batch in batches:
        assert len({(len(job.images), job.max_new_tokens) for job in batch}) == 1
        lengths = [len(job.prompt) for job in batch]
        assert lengths == sorted(lengths, reverse=True)
    assert sum(len(batch) == 4 for batch in batches) >= 6


def test_images_stand_where_the_marks_are():
    assert split_at_images("What?", 2) == [None, None, "What?"]
    assert split_at_images("Is <image> or\n<image>", 2) == ["Is ", None, " or", None]
    with pytest.raises(ValueError, match="1 <image> marks in the prompt, but 2 images"):
        split_at_images("<image>", 2)

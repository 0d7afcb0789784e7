# SPDX-License-Identifier: Apache-2.0

"""A SigLIP vision tower (no class token, own size and normalisation), by naming it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, SiglipModel

from examples.tiny_bases import TinyVision, write_tiny_vision
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.hub import image_tokens
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.loading import load_model
from tests.model.exporting import export, predictor_of, stage_config, trained_model

SIZES = {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2}
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_bases):
    folder = tmp_path_factory.mktemp("siglip")
    (folder / "llm").symlink_to(tiny_bases / "llm")
    write_tiny_vision(folder / "vision", TinyVision(**SIZES, siglip=True, whole=True), seed=0)
    return folder


def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    return [Image.fromarray(pixels)]


def test_features_are_those_of_transformers_without_losing_a_patch(bases):
    vision = str(bases / "vision")
    assert image_tokens(vision) == 16
    transform = ImageTransform.from_pretrained(vision)
    assert (transform.image_size, transform.mean, transform.std) == (56, (0.5,) * 3, (0.5,) * 3)
    model = trained_model(stage_config(bases, "stage1_shallow"))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = SiglipModel.from_pretrained(vision).vision_model
        hidden = whole(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(model.encode_images(pixels), model.projector(hidden), atol=1e-5)


@pytest.mark.parametrize("save_format", ["huggingface", "xtuner"])
def test_an_export_answers_as_the_trained_model(bases, tmp_path, save_format):
    cfg = stage_config(bases, "stage3_instruct")
    model = trained_model(cfg)
    folder = export(model, cfg, tmp_path / "export", save_format=save_format)
    asked = {"max_new_tokens": 8}
    expected = predictor_of(model, bases).answer(QUESTION, images(), **asked)
    again = load_model(folder)
    assert again.transform.mean == (0.5,) * 3
    assert again.answer(QUESTION, images(), **asked) == expected
    if save_format == "xtuner":
        return
    # transformers alone
    processor = AutoProcessor.from_pretrained(folder)
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(images=images()[0], text=text, return_tensors="pt")
    ids = llava.generate(**inputs, **asked)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == expected
    assert "SigLIP vision tower" in (folder / "README.md").read_text()


def test_a_format_without_a_place_for_it_is_refused(bases, tmp_path):
    pytest.importorskip("gguf")
    cfg = stage_config(bases, "stage3_instruct")
    with pytest.raises(GMAIError, match="can't write a vision tower 'siglip_vision_model'"):
        export(trained_model(cfg), cfg, tmp_path / "export", save_format="gguf")
    assert not (tmp_path / "export").exists()

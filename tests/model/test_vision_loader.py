# SPDX-License-Identifier: Apache-2.0

"""The CLIP vision tower: whole or vision part, safetensors or bin, and what may be left over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig

from examples.tiny_bases import TinyVision, write_tiny_vision
from gmai_xtuner.checkpoint.bases import load_vision_tower
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.model.llava import num_image_tokens

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def write(directory: Path, **options) -> str:
    write_tiny_vision(directory, TinyVision(**SMALL, **options), seed=0)
    return str(directory)


def edit(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_whole_clip_gives_the_same_features_as_its_own_vision_model(tmp_path):
    whole = write(tmp_path / "whole", whole=True)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = load_vision_tower(whole)(pixels, output_hidden_states=True).hidden_states[-2]
        clip = CLIPModel.from_pretrained(whole).vision_model
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    assert got.shape == (1, 1 + 64, 32)
    assert torch.equal(got, expected)


def test_bin_equals_safetensors_even_with_the_hubs_old_buffers(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    expected = load_vision_tower(write(tmp_path / "safe", whole=True)).state_dict()
    other = write(tmp_path / "bin", whole=True, safe_serialization=False)
    path = tmp_path / "bin" / "pytorch_model.bin"
    weights = torch.load(path)
    weights["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(weights, path)
    got = load_vision_tower(other).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "expected"), [(336, 14, 576), (336, 42, 64), (224, 32, 49)]
)
def test_number_of_image_tokens(image_size, patch_size, expected):
    config = CLIPVisionConfig(image_size=image_size, patch_size=patch_size)
    assert num_image_tokens(config) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype(tmp_path, wanted, expected):
    tower = load_vision_tower(write(tmp_path / "vision"), torch_dtype=wanted)
    assert {parameter.dtype for parameter in tower.parameters()} == {expected}


@pytest.mark.parametrize("whole", [False, True])
def test_meta_build_has_the_structure_and_reads_no_weight(tmp_path, whole):
    directory = write(tmp_path / "vision", whole=whole)
    (tmp_path / "vision" / "model.safetensors").unlink()
    with init_empty_weights():
        tower = load_vision_tower(directory)
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    assert tower.config.hidden_size == 32
    with pytest.raises(ModelLoadError, match="no weights"):
        load_vision_tower(directory)


def cut_patches(weights):
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name][:, :, :14, :14].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("vision_model.post_layernorm.weight"), "1 missing .*post_layernorm"),
        (lambda w: w.update({"vision_model.extra": torch.ones(1)}), "1 unexpected .*model.extra"),
        (cut_patches, "patch_embedding"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    directory = write(tmp_path / "vision", whole=True)
    edit(tmp_path / "vision", change)
    with pytest.raises(ModelLoadError, match=message):
        load_vision_tower(directory)


def test_another_model_and_a_damaged_file_are_errors(tmp_path):
    directory = write(tmp_path / "vision")
    weights = tmp_path / "vision" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors can't be read"):
        load_vision_tower(directory)
    config = tmp_path / "vision" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "siglip"}))
    with pytest.raises(ModelLoadError, match="'siglip' is not supported"):
        load_vision_tower(directory)

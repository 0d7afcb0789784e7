# SPDX-License-Identifier: Apache-2.0

"""Exported files hold the weights and nothing else, whatever buffer the checkpoint's tensors lie in."""

from __future__ import annotations

import pytest
import torch

from gmai_xtuner.core.errors import GMAIError
from tests.model.exporting import stage_config, trained_model

WEIGHTS = ("*.bin", "*.safetensors")
KIB = 1024


def from_flat_buffer(tiny_bases):
    """(stage 3's model, its config), weights as DeepSpeed gives them back: views of one flat tensor."""
    cfg = stage_config(tiny_bases, "stage3_instruct")
    model = trained_model(cfg)
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return model, cfg


def written(folder):
    return [file for pattern in WEIGHTS for file in folder.glob(pattern)]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fp32", [False, True])
def test_views_of_one_flat_buffer_take_no_more_than_their_own_bytes(
    tiny_bases, tmp_path, fp32, safe
):
    model, cfg = from_flat_buffer(tiny_bases)
    bytes_of = {
        name: sum(value.numel() for value in getattr(model, name).parameters()) * 4
        for name in ("llm", "visual_encoder", "projector")
    }
    if not fp32:
        bytes_of["llm"] //= 2
    limit = 1_500_000  # the largest matrix has 1.35 MB
    model.to_hf(
        cfg=cfg,
        save_dir=str(tmp_path / "out"),
        fp32=fp32,
        save_pretrained_kwargs={"safe_serialization": safe, "max_shard_size": "1500KB"},
    )
    folders = {"llm": "", "visual_encoder": "visual_encoder", "projector": "projector"}
    for name, folder in folders.items():
        files = written(tmp_path / "out" / folder)
        size = sum(file.stat().st_size for file in files)
        # Names, shapes and alignment come on top.
        assert bytes_of[name] <= size < bytes_of[name] + 32 * KIB * len(files), name
        assert all(file.stat().st_size < limit + 32 * KIB for file in files), name
        assert len(files) >= bytes_of[name] / limit, name


def test_the_whole_llava_is_divided_over_shards_too(tiny_bases, tmp_path):
    model, cfg = from_flat_buffer(tiny_bases)
    model.to_hf(
        cfg=cfg,
        save_dir=str(tmp_path / "out"),
        fp32=True,
        save_format="huggingface",
        save_pretrained_kwargs={"max_shard_size": "1500KB"},
    )
    files = written(tmp_path / "out")
    assert len(files) >= 4
    assert all(file.stat().st_size < 1_500_000 + 32 * KIB for file in files)


@pytest.fixture(scope="module")
def stage1(tiny_bases):
    cfg = stage_config(tiny_bases, "stage1_shallow")
    return trained_model(cfg), cfg


@pytest.mark.parametrize("save_format", ["xtuner", "huggingface"])
@pytest.mark.parametrize("size", ["nonsense", "5", "0GB", "-2GB"])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_written(
    tmp_path, save_format, size, stage1
):
    model, cfg = stage1
    with pytest.raises(GMAIError, match=f"such as 2GB; got '{size}'"):
        model.to_hf(
            cfg=cfg,
            save_dir=str(tmp_path / "out"),
            save_format=save_format,
            save_pretrained_kwargs={"max_shard_size": size},
        )
    assert not any(tmp_path.iterdir())

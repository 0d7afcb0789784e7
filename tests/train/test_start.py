# SPDX-License-Identifier: Apache-2.0

"""A large model does not begin to train on the CPU by accident."""

import json

import pytest
import torch

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import start
from tests.preflight.bases import INTERNLM2_5_7B


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Config of a language model of InternLM2.5-7B's size, whose weights are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("GMAI_ALLOW_CPU", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM2_5_7B))
    return {
        "type": "gmai_xtuner.checkpoint.bases.load_language_model",
        "pretrained_model_name_or_path": str(tmp_path),
    }


def test_a_large_model_without_a_gpu_names_driver_and_wheel(large, tmp_path, monkeypatch):
    driver = tmp_path / "version"
    monkeypatch.setattr(start, "DRIVER_FILE", driver)
    with pytest.raises(
        GMAIError, match=r"7\.7 billion weights: no NVIDIA driver.*GMAI_ALLOW_CPU=1"
    ):
        start.check_device(large)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    with pytest.raises(GMAIError, match=r"the NVIDIA driver is 535\.183.*driver 580 or newer"):
        start.check_device(large)


def test_it_trains_there_when_asked(large, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_CPU", "1")
    start.check_device(large)


def test_a_small_model_trains_on_the_cpu(large, tiny_bases):
    start.check_device(large | {"pretrained_model_name_or_path": str(tiny_bases / "llm")})

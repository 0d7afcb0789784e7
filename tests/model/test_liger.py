# SPDX-License-Identifier: Apache-2.0

"""Liger's kernels: parity with transformers' own code, and errors before weights are read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers.models.llama import modeling_llama

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.model import liger
from tests.model.test_llava import build_model

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="needs the extra 'liger' (liger-kernel and triton)",
)


def run_parity(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.liger_parity", device],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("parity")


@needs_liger
@pytest.mark.slow
def test_same_loss_and_gradients_as_transformers_through_tritons_interpreter():
    run_parity("cpu", TRITON_INTERPRET="1")


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_loss_and_gradients_as_transformers_on_cuda():
    run_parity("cuda")


def test_without_a_gpu_the_error_comes_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nowhere = {"type": "gmai_xtuner.checkpoint.bases.load_language_model"}
    with pytest.raises(GMAIError, match=r"liger=True needs a CUDA device.*liger=False"):
        GMAILLaVAModel(nowhere, nowhere, liger=True)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in list(sys.modules):
        if name.startswith("liger_kernel."):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(GMAIError, match=r"liger-kernel .*gmai-xtuner\[liger\]"):
        liger.require_liger()


def test_a_model_on_the_meta_device_needs_no_kernels(monkeypatch):
    """``xtuner convert pth_to_hf`` builds the model of the config on machines without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with init_empty_weights():
        model = build_model(liger=True)
    assert model.llm.lm_head.weight.device.type == "meta"


def test_other_models_are_refused():
    with pytest.raises(GMAIError, match="got Linear"):
        liger.install_liger(torch.nn.Linear(2, 2))
    model = build_model()
    model.llm.config.hidden_act = "gelu"
    with pytest.raises(GMAIError, match="with gelu"):
        liger.install_liger(model.llm)


def test_another_transformers_is_noticed():
    with pytest.raises(GMAIError, match=r"transformers 4\.48"):
        liger._with_global(modeling_llama.LlamaAttention.forward, "rotate_half", None)

# SPDX-License-Identifier: Apache-2.0

"""The rehearsal of the 7B, at the tiny bases' width; and the product of two bf16 matrices on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from gmai_xtuner import compat
from tests.examples.forks import in_a_fork, load


@pytest.mark.slow
def test_every_step_runs_and_is_measured(tmp_path, monkeypatch, capsys):
    """With a SigLIP, of which no other test trains: CLIP's stages are in tests/commands."""
    work_dir = tmp_path / "rehearsal"
    rehearsal = load("rehearsal")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(rehearsal.quickstart, "run_command", in_a_fork)
    monkeypatch.chdir(tmp_path)
    status = rehearsal.main(["--tiny", "--work-dir", str(work_dir), "--siglip"])
    assert status == 0, capsys.readouterr().err[-4000:]
    report = json.loads((work_dir / "report.json").read_text())
    assert len(report) == 8
    assert all(one["private_gib"] > 0.1 for one in report.values())
    assert "ANSWER [" in (work_dir / "answer_by_transformers.log").read_text()
    assert not (work_dir / "huggingface").exists()  # the weights are removed


@pytest.mark.skipif(torch.cpu._is_avx512_bf16_supported(), reason="bf16 is fast here")
def test_bf16_layers_multiply_in_fp32_when_a_large_model_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.nn.Linear, "forward", torch.nn.Linear.forward)  # put back at the end
    layer = torch.nn.Linear(64, 48).bfloat16()
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setenv("GMAI_ALLOW_CPU", "0")
    compat.multiply_in_fp32()
    assert not hasattr(torch.nn.Linear.forward, "__wrapped__")
    monkeypatch.setenv("GMAI_ALLOW_CPU", "1")
    compat.multiply_in_fp32()

    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest)
    )
    answer = layer(hidden)
    answer.sum().backward()
    assert seen == [torch.float32]
    assert answer.dtype == hidden.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    exact = hidden.detach().double() @ layer.weight.detach().double().T + layer.bias.double()
    assert torch.equal(answer, exact.to(torch.bfloat16))

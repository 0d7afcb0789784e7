# SPDX-License-Identifier: Apache-2.0

"""Workarounds that no other test would miss."""

import threading
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from gmai_xtuner import compat
from gmai_xtuner.compat import deepspeed as deepspeed_compat


def idle_teams() -> int:
    return sum(thread.name == "idle OpenMP team" for thread in threading.enumerate())


def test_waiting_threads_sleep_where_a_step_has_several_and_nothing_else_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compat, "_idle_team", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = idle_teams()
    compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before

    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for _ in range(2):
        compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before + 1


@pytest.mark.parametrize(
    ("overlap", "expected"), [(True, ["recorded", "reduced"]), (False, ["reduced"])]
)
def test_a_gradient_is_kept_until_another_stream_has_reduced_it(overlap, expected):
    done = []
    gradient = SimpleNamespace(is_cuda=True, record_stream=lambda stream: done.append(stream))
    reduce = deepspeed_compat._kept_until_reduced(lambda *_: done.append("reduced"))
    reduce(SimpleNamespace(overlap_comm=overlap, reduction_stream="recorded"), gradient)
    assert done == expected


def test_zero3_waits_for_the_stream_that_made_the_gradient(monkeypatch):
    accelerator = SimpleNamespace(
        resolves_data_dependency=lambda: False, current_stream=lambda: "the current stream"
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    done = []
    add = deepspeed_compat._after_the_current_stream(lambda *_: done.append("added"))
    stream = SimpleNamespace(wait_stream=done.append)
    add(SimpleNamespace(reduce_and_partition_stream=stream), None)
    assert done == ["the current stream", "added"]


def test_deepspeed_uses_both():
    assert hasattr(DeepSpeedZeroOptimizer.average_tensor, "__wrapped__")
    add = "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket"
    assert hasattr(getattr(DeepSpeedZeroOptimizer_Stage3, add), "__wrapped__")

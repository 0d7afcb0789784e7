"""Workarounds that no other test would miss."""

import threading

import torch

from gmai_xtuner.compat import torch as torch_compat


def idle_teams() -> int:
    return sum(thread.name == "idle OpenMP team" for thread in threading.enumerate())


def test_waiting_threads_sleep_where_a_step_has_several_and_nothing_else_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch_compat, "_idle_team", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = idle_teams()
    torch_compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    torch_compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before

    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for _ in range(2):
        torch_compat.sleep_while_waiting_for_threads()
    assert idle_teams() == before + 1

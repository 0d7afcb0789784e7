"""The loop's refusals, without training; what it trains is in ``tests/commands``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gmai_xtuner.engine import loop as loop_module
from gmai_xtuner.engine.loop import PackedTrainLoop, _round_up_to_step, with_loader_defaults
from gmai_xtuner.errors import GMAIError


class Sampler:
    """Five micro-batches an epoch in steps of two: the last step is short."""

    accumulative_counts = 2

    def __len__(self) -> int:
        return 5

    def step_ends(self, micro_batch: int) -> bool:
        return micro_batch in (1, 3, 4)


def bare_loop(**attributes) -> PackedTrainLoop:
    loop = PackedTrainLoop.__new__(PackedTrainLoop)
    loop.__dict__.update(attributes)
    return loop


@pytest.mark.parametrize(("asked", "trained"), [(1, 2), (2, 2), (3, 4), (5, 5), (6, 7), (10, 10)])
def test_a_run_never_ends_inside_a_step(asked, trained):
    assert _round_up_to_step(asked, Sampler()) == trained


def test_steps_of_a_run_count_the_short_ones():
    dataloader = SimpleNamespace(batch_sampler=SimpleNamespace(steps=3))
    loop = bare_loop(dataloader=dataloader, _max_iters=9)
    sampler = Sampler()
    sampler.steps = 3
    loop.dataloader = SimpleNamespace(batch_sampler=sampler)
    assert loop.total_steps == 3 + 2


def test_ranks_that_see_other_data_are_named(monkeypatch):
    orders = [{"packs": 7}, {"packs": 7}, {"packs": 6}]
    monkeypatch.setattr(loop_module, "all_gather_object", lambda order: orders)
    loop = bare_loop(_data_order=lambda: orders[0])
    with pytest.raises(GMAIError, match=r"ranks \[2\].*'packs': 6.*'packs': 7.*GMAI_CACHE"):
        loop._check_ranks_agree()
    monkeypatch.setattr(loop_module, "all_gather_object", lambda order: orders[:2])
    loop._check_ranks_agree()


def test_accumulation_must_be_set_in_both_places():
    model = SimpleNamespace(gradient_accumulation_steps=lambda: 4)
    loop = bare_loop(
        _runner=SimpleNamespace(model=model), dataloader=SimpleNamespace(batch_sampler=Sampler())
    )
    with pytest.raises(GMAIError, match=r"is 4, but .* is 2; set both"):
        loop._check_accumulation()


def test_a_checkpoint_from_inside_a_step_is_refused():
    order = {"plan": "a"}
    hub = SimpleNamespace(get_info=lambda name: order, update_info=lambda name, value: None)
    loop = bare_loop(
        _runner=SimpleNamespace(message_hub=hub),
        dataloader=SimpleNamespace(batch_sampler=Sampler()),
        _data_order=lambda: order,
        _iter=3,
    )
    with pytest.raises(GMAIError, match="inside an optimiser step"):
        loop._check_resumed_order()
    loop._iter = 4
    loop._check_resumed_order()


def test_options_that_need_workers_go_when_there_are_none():
    plain = {"num_workers": 0, "persistent_workers": True, "prefetch_factor": 2}
    assert set(with_loader_defaults(plain)) == {"num_workers", "pin_memory"}
    assert "persistent_workers" in with_loader_defaults({**plain, "num_workers": 2})

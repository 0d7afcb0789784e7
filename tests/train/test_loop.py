"""The loop's refusals, without training; what it trains is in ``tests/commands``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import loop as loop_module
from gmai_xtuner.train.loop import PackedTrainLoop, _round_up_to_step, with_loader_defaults


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


def resumed_loop(
    order: dict[str, object], info: dict[str, object], **attributes
) -> PackedTrainLoop:
    hub = SimpleNamespace(get_info=info.get, update_info=info.__setitem__)
    return bare_loop(
        _runner=SimpleNamespace(message_hub=hub),
        dataloader=SimpleNamespace(batch_sampler=Sampler()),
        _data_order=lambda: order,
        _max_iters=10,
        **attributes,
    )


def test_a_checkpoint_from_inside_a_step_is_refused():
    order = {"plan": "a"}
    loop = resumed_loop(order, {loop_module.DATA_ORDER: order}, _iter=3)
    with pytest.raises(GMAIError, match="inside an optimiser step"):
        loop._check_resumed_order()
    loop._iter = 4
    loop._check_resumed_order()


def test_a_resumed_run_with_another_setting_is_refused_and_the_setting_named():
    before = {"held_out": 0.2, "plan": "a"}
    loop = resumed_loop({"held_out": 0.1, "plan": "b"}, {loop_module.DATA_ORDER: before}, _iter=4)
    with pytest.raises(GMAIError, match=r"iteration 4: held_out: 0\.2 -> 0\.1, plan: a -> b"):
        loop._check_resumed_order()


def test_a_resumed_run_of_another_length_says_so(monkeypatch):
    told = []
    monkeypatch.setattr(loop_module, "print_log", lambda text, **_: told.append(text))
    order = {"plan": "a"}
    info = {loop_module.DATA_ORDER: order, loop_module.LENGTH: 10}
    resumed_loop(order, info, _iter=4)._check_resumed_order()
    assert told == []
    info[loop_module.LENGTH] = 20
    resumed_loop(order, info, _iter=4)._check_resumed_order()
    assert "was 20 micro-batches long when it was stopped, and is 10 now" in told[0]
    assert info[loop_module.LENGTH] == 10


def test_options_that_need_workers_go_when_there_are_none():
    plain = {"num_workers": 0, "persistent_workers": True, "prefetch_factor": 2}
    assert set(with_loader_defaults(plain)) == {"num_workers", "pin_memory"}
    assert "persistent_workers" in with_loader_defaults({**plain, "num_workers": 2})

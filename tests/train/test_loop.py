# SPDX-License-Identifier: Apache-2.0

"""The loop's refusals, without training; what it trains is in ``tests/commands``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import loop as loop_module
from gmai_xtuner.train.loop import PackedTrainLoop, with_loader_defaults


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


def test_ranks_that_see_other_data_are_named(monkeypatch):
    orders = [{"packs": 7}, {"packs": 7}, {"packs": 6}]
    monkeypatch.setattr(loop_module, "all_gather_object", lambda order: orders)
    loop = bare_loop(_data_order=lambda: orders[0])
    with pytest.raises(GMAIError, match=r"ranks \[2\].*'packs': 6.*'packs': 7.*GMAI_CACHE"):
        loop._check_ranks_agree()
    monkeypatch.setattr(loop_module, "all_gather_object", lambda order: orders[:2])
    loop._check_ranks_agree()


def test_the_engine_must_sum_as_many_micro_batches_as_the_sampler_normalises_for():
    model = SimpleNamespace(gradient_accumulation_steps=lambda: 4)
    loop = bare_loop(
        _runner=SimpleNamespace(model=model), dataloader=SimpleNamespace(batch_sampler=Sampler())
    )
    with pytest.raises(GMAIError, match=r"sums 4 micro-batches a step, but the batch sampler 2"):
        loop._check_accumulation()


class Recorder:
    """As much of a runner as the loop uses; ``calls`` is what it was asked for, in order."""

    work_dir = "."

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.optim_wrapper = None
        self.model = SimpleNamespace(
            train=lambda: None,
            set_gradient_accumulation_boundary=lambda end: self.calls.append(("boundary", end)),
            train_step=lambda batch, optim_wrapper: (
                self.calls.append(("train", batch["data"]["loss_denominator"]))
                or {"weighted_sum": 0.0}
            ),
            gradient_accumulation_steps=lambda: 2,
        )
        self.val_loop = SimpleNamespace(run=lambda: self.calls.append(("validate",)))

    def call_hook(self, name, **_) -> None:
        if name == "after_step":
            self.calls.append(("step", self.loop.step))


def test_steps_validations_and_denominators_of_a_run():
    """Two epochs of five micro-batches in steps of two; a validation every second step and at the end."""
    runner, positions = Recorder(), []
    batch_sampler = Sampler()
    batch_sampler.steps_after = lambda iterations: iterations // 5 * 3 + iterations % 5 // 2
    batch_sampler.set_position = lambda epoch, start: positions.append((epoch, start))
    batch_sampler.loss_denominator = lambda epoch, position: 10 * epoch + position

    class Loader:
        def __iter__(self):
            return iter([{"data": {}} for _ in range(positions[-1][1], 5)])

    loader = Loader()
    loader.batch_sampler = batch_sampler
    loop = bare_loop(
        _runner=runner, dataloader=loader, _iter=2, _max_iters=10, step=0, step_end=False,
        val_interval=2, stop_training=False, optim_wrapper=None, resumed_from=None,
        _check_ranks_agree=lambda: None, _check_resumed_order=lambda: None,
    )  # fmt: skip
    runner.loop = loop
    loop._run()
    assert positions == [(0, 2), (1, 0)]
    assert [call[1] for call in runner.calls if call[0] == "train"] == [2, 3, 4, 10, 11, 12, 13, 14]
    assert [call for call in runner.calls if call[0] in ("step", "validate")] == [
        ("step", 2), ("validate",), ("step", 3), ("step", 4), ("validate",), ("step", 5),
        ("step", 6), ("validate",),
    ]  # fmt: skip
    assert [call[1] for call in runner.calls if call[0] == "boundary"] == [
        False, True, True, False, True, False, True, True,
    ]  # fmt: skip


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
    monkeypatch.setattr(loop_module, "warn", told.append)
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

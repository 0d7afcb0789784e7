# SPDX-License-Identifier: Apache-2.0

"""The loop's refusals, without training; what it trains is in ``tests/commands``."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.runner import LogProcessor

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.sampler import MicroBatchSampler
from gmai_xtuner.train import loop as loop_module
from gmai_xtuner.train.hooks import ProgressHook
from gmai_xtuner.train.loop import PackedTrainLoop, with_loader_defaults
from gmai_xtuner.train.schedule import OptimizerStepScheduleHook, WarmupCosineLR


def five_packs(packs: int = 5, count: int = 2, world: int = 1, **options) -> MicroBatchSampler:
    """By default five micro-batches an epoch in steps of two: the last step is short."""
    return MicroBatchSampler(
        range(packs), 1, accumulative_counts=count, rank=0, world_size=world, **options
    )


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
        _runner=SimpleNamespace(model=model), dataloader=SimpleNamespace(batch_sampler=five_packs())
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
    batch_sampler = five_packs()
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
    order: dict[str, object], info: dict[str, object], sampler=None, **attributes
) -> PackedTrainLoop:
    hub = SimpleNamespace(
        get_info=lambda key, default=None: info.get(key, default), update_info=info.__setitem__
    )
    return bare_loop(
        _runner=SimpleNamespace(message_hub=hub),
        dataloader=SimpleNamespace(batch_sampler=sampler or five_packs()),
        _data_order=lambda: order,
        **{"_max_iters": 10, **attributes},
    )


def test_a_checkpoint_from_inside_a_step_is_refused():
    order = {"plan": "a"}
    loop = resumed_loop(order, {loop_module.DATA_ORDER: order}, _iter=3)
    with pytest.raises(GMAIError, match="inside an optimiser step"):
        loop._check_resumed_order()
    loop._iter = 4
    assert not loop._check_resumed_order()


def layout(world: int, count: int) -> dict[str, object]:
    return {"plan": "a", "world_size": world, "batch_size": 1, "accumulative_counts": count}


@pytest.mark.parametrize(
    ("before", "iteration", "after"),
    # 22 packs in steps of four: five whole steps and one of two packs an epoch.
    [
        ((1, 4), 8, 4), ((1, 4), 22, 11), ((1, 4), 22 + 4, 11 + 2), ((4, 1), 3, 6), ((4, 1), 6 + 1, 11 + 2),
    ],
)  # fmt: skip
def test_a_resumed_run_finds_its_step_in_another_layout(before, iteration, after):
    info = {
        loop_module.DATA_ORDER: layout(*before),
        loop_module.LENGTH: 44 if before == (1, 4) else 12,
    }
    loop = resumed_loop(layout(2, 2), info, five_packs(22, 2, 2), _iter=iteration, _max_iters=22)
    assert loop._check_resumed_order()
    assert loop._iter == after
    assert info == {loop_module.DATA_ORDER: layout(2, 2), loop_module.LENGTH: 22}


@pytest.mark.parametrize(
    ("now", "sampler", "told"),
    [
        (
            {"plan": "b", "held_out": 0.1},
            five_packs(),
            r"plan: a -> b, held_out: None -> 0\.1\. Resume with the data",
        ),
        (
            layout(2, 4),
            five_packs(22, 4, 2),
            r"packs of an optimiser step: 4 -> 8\. .*GPUs x batch_size",
        ),
        (
            layout(2, 2),
            five_packs(22, 2, 2, weighting="micro_batch"),
            "world_size: 1 -> 2, accumulative_counts: 4 -> 2. .*on which the weighting micro_batch depends",
        ),
    ],
)
def test_a_resumed_run_with_other_data_or_another_step_is_refused(now, sampler, told):
    loop = resumed_loop(now, {loop_module.DATA_ORDER: layout(1, 4)}, sampler, _iter=8)
    with pytest.raises(GMAIError, match=f"iteration 8: {told}"):
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
    assert "was 12 optimiser steps long when it was stopped, and is 6 now" in told[0]
    assert info[loop_module.LENGTH] == 10


def test_options_that_need_workers_go_when_there_are_none():
    plain = {"num_workers": 0, "persistent_workers": True, "prefetch_factor": 2}
    assert set(with_loader_defaults(plain)) == {"num_workers", "pin_memory"}
    assert "persistent_workers" in with_loader_defaults({**plain, "num_workers": 2})


# --- Each logged number is the mean of what it covers, whatever interval, epoch and resume ---


class Run:
    """A run as the hooks see it; :attr:`shown` has the loss, time and micro-batch of each line of the log."""

    def __init__(self, interval: int, epoch: int, total: int) -> None:
        self.hub = MessageHub.get_instance(f"hooks_{id(self)}")
        self.shown: list[tuple[int, float, float]] = []
        processor = LogProcessor(by_epoch=False, mean_pattern=r".*time.*")
        self.logger = LoggerHook(interval=interval, log_metric_by_epoch=False)
        self.logger.json_log_path = ""

        def show(runner, batch_idx, mode):
            tag = processor._collect_scalars([], runner, mode)
            self.shown.append((batch_idx, tag["loss"], tag["time"]))
            return tag, ""

        processor.get_log_after_iter = show
        self.warned: list[str] = []
        ignore = SimpleNamespace(
            warning=self.warned.append, info=lambda _: None, add_scalars=lambda *_, **__: None
        )
        self.runner = SimpleNamespace(
            hooks=[self.logger], iter=0, max_iters=total, message_hub=self.hub,
            train_dataloader=range(epoch), log_processor=processor, logger=ignore,
            visualizer=ignore, experiment_name="",
            model=SimpleNamespace(module=None, get_global_grad_norm=lambda: None),
            train_loop=SimpleNamespace(step_end=True),
        )  # fmt: skip
        self.hook = self.begin()

    def begin(self) -> ProgressHook:
        hook = ProgressHook()
        hook.before_train(self.runner)
        return hook

    def train(self, number: int) -> None:
        self.runner.iter = number
        tokens = 1 + number % 3
        self.runner.train_loop.weighted_sum = torch.tensor(float(tokens * number))
        data = {
            "num_tokens": 5,
            "lengths": [2, 3],
            "capacity": 8,
            "pixel_values": torch.zeros(0),
            "label_weight": float(tokens),
        }
        self.hook.after_train_iter(self.runner, number, {"data": data})
        self.hub.update_scalar("train/time", float(number))
        self.logger.after_train_iter(self.runner, number)


@settings(max_examples=60)
@given(
    interval=st.integers(1, 15),
    epoch=st.integers(1, 20),
    total=st.integers(1, 30),
    resume_at=st.none() | st.integers(0, 29),
)
@example(interval=10, epoch=6, total=6, resume_at=None)
@example(interval=4, epoch=3, total=12, resume_at=5)
def test_each_logged_number_is_the_mean_of_what_it_covers(interval, epoch, total, resume_at):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "gmai_xtuner.train.hooks.ModelFlops.of",
            lambda _: SimpleNamespace(of_batch=lambda data: 0),
        )
        run = Run(interval, epoch, total)
        for number in range(total):
            if number == resume_at:
                state = run.hook.rank_state_dict()
                run.hook = run.begin()
                run.hook.load_rank_state_dict(state)
            run.train(number)
    run.runner.iter = total
    run.hook.after_train(run.runner)
    if resume_at is None and len(run.shown) > 1:  # the loss of micro-batch n is n
        assert "The loss has not fallen" in run.warned[0]
    elif total == 1 or 1 < (resume_at or 0) < total:
        assert not run.warned
    first = 0
    for number, loss, seconds in run.shown:
        covered = range(first, number + 1)
        tokens = [1 + n % 3 for n in covered]
        mean = sum(t * n for t, n in zip(tokens, covered, strict=True)) / sum(tokens)
        assert loss == pytest.approx(mean)
        assert seconds == pytest.approx(sum(covered) / len(covered))
        first = number + 1
    assert run.shown or total < min(interval, epoch)


# --- The learning rate against values by hand ---


def rates(total, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosineLR(optimizer, by_epoch=False, begin=0, end=total, **options)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warm_up_then_cosine():
    values = rates(10, warmup_ratio=0.2)
    assert values[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert values[6] == pytest.approx(1.0)  # half of the cosine
    assert values[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))


@pytest.mark.parametrize("total", [1, 2, 5])
def test_a_run_too_short_for_a_warm_up_starts_at_the_full_rate(total):
    values = rates(total, warmup_ratio=0.03)
    assert values[0] == 2.0
    assert all(value > 0 for value in values)


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        rates(4, warmup_ratio=share)


def runner_with(
    configured: float, *, resumed: bool = False, engine: float = 1.0, steps: int = 10
) -> SimpleNamespace:
    """As much of a runner as the hook needs; the engine's rates are ``engine`` times the schedule's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    warnings: list[str] = []
    scheduler = WarmupCosineLR(optimizer, by_epoch=False, begin=0, end=steps)
    engines = [{"lr": 2.0 * engine}] if engine != 1.0 else optimizer.param_groups
    return SimpleNamespace(
        param_schedulers=[scheduler],
        train_loop=SimpleNamespace(
            total_steps=steps, step=0, resumed_from="it" if resumed else None
        ),
        model=SimpleNamespace(optimizer=SimpleNamespace(param_groups=engines)),
        cfg={"optim_wrapper": {"optimizer": {"lr": configured}}},
        logger=SimpleNamespace(warning=warnings.append),
        warnings=warnings,
    )


@pytest.mark.parametrize(("configured", "told"), [(2.0, False), (0.5, True)])
def test_a_rate_of_the_config_that_a_resumed_run_does_not_take_is_told(configured, told):
    runner = runner_with(configured, resumed=True)
    OptimizerStepScheduleHook().before_train(runner)
    assert bool(runner.warnings) is told
    assert not told or "goes on from the 2 that this run began with" in runner.warnings[0]


@pytest.mark.parametrize(
    ("steps", "rate", "says"),
    [
        (1, 2.0, "1 optimiser step, whose learning rates add up to 2"),
        (9, 2.0, "9 optimiser steps"),
        (10, 2.0, None),
        (16, 1e-5, "16 optimiser steps, whose learning rates add up to 8e-05"),
        (40, 1e-5, None),
    ],
)
def test_a_run_that_is_too_small_says_so(steps, rate, says):
    runner = runner_with(2.0, steps=steps)
    runner.param_schedulers[0].base_values[:] = [rate]
    runner.cfg["optim_wrapper"]["optimizer"]["lr"] = rate
    OptimizerStepScheduleHook().before_train(runner)
    assert bool(runner.warnings) is (says is not None)
    assert says is None or says in runner.warnings[0]


def test_a_new_run_that_does_not_begin_with_the_configs_rate_is_refused():
    with pytest.raises(
        GMAIError, match=r"built with the learning rate 2, but the config's is 0\.5"
    ):
        OptimizerStepScheduleHook().before_train(runner_with(0.5))


def test_an_engine_that_does_not_step_with_the_schedules_rate_stops_the_run():
    hook = OptimizerStepScheduleHook()
    with pytest.raises(GMAIError, match=r"step 1 has the lr \[0.0\], but the schedule .* \[2.0\]"):
        hook.before_train(runner_with(2.0, engine=0.0))
    runner = runner_with(2.0)
    hook.before_train(runner)
    hook.after_step(runner)
    runner.model.optimizer.param_groups[0]["lr"] = 5e-5  # as DeepSpeed's own scheduler does
    with pytest.raises(GMAIError, match="something else sets it"):
        hook.after_step(runner)

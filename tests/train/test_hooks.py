# SPDX-License-Identifier: Apache-2.0

"""Each logged number is the mean of what it covers, whatever interval, epoch and resume."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.runner import LogProcessor

from gmai_xtuner.train.hooks import ProgressHook


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
            "label_weights": torch.ones(tokens),
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

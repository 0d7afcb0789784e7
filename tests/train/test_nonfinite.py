# SPDX-License-Identifier: Apache-2.0

"""Steps that are left out, under real DeepSpeed engines on two processes of which one sees the NaN."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import nonfinite
from gmai_xtuner.train.checkpointing import StepCheckpointHook
from gmai_xtuner.train.hooks import ProgressHook
from gmai_xtuner.train.nonfinite import COUNTS, NonFiniteError, NonFiniteHook, StepGuard
from tests import warm

WORLD = 2
ACCUMULATION = 2
STEPS = 8
# Step -> where rank 1 meets the NaN; "loss alone" is infinite, and every gradient finite.
BAD_STEPS = {0: "early micro-batch", 2: "last micro-batch", 4: "gradient alone", 6: "loss alone"}
# ZeRO stage, precision, optimiser offloaded.
ENGINES = [
    (1, "fp32", False),
    (2, "bf16", False),
    (2, "fp32", True),
    (3, "bf16", False),
    (3, "fp32", True),
]


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * float("nan")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, inputs: torch.Tensor, *, nan_gradient: bool = False) -> torch.Tensor:
        hidden = self.first(inputs.to(self.first.weight.dtype)).relu()
        return (
            self.second(_NanGradient.apply(hidden) if nan_gradient else hidden)
            .float()
            .square()
            .mean()
        )


class Wrapper:
    """As much of mmengine's DeepSpeedOptimWrapper as the guard uses."""

    def __init__(self, engine) -> None:
        self.model = engine

    def backward(self, loss) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()


def _start(stage: int, precision: str, offload: bool):
    import deepspeed

    zero = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 10_000,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
        },
    )
    return engine


def _state(engine) -> torch.Tensor:
    """This rank's part of the fp32 weights, and of both moments of Adam."""
    zero = engine.optimizer
    parts = (
        zero.fp32_partitioned_groups_flat
        if hasattr(zero, "fp32_partitioned_groups_flat")
        else zero.single_partition_of_fp32_groups
    )
    moments = [
        zero.optimizer.state[part].get(key) for part in parts for key in ("exp_avg", "exp_avg_sq")
    ]
    state = [*parts, *(moment for moment in moments if moment is not None)]
    return torch.cat([part.detach().flatten() for part in state]).clone()


def _train(rank: int, engine, guard: StepGuard, *, leave_out: bool) -> dict:
    """Steps of two micro-batches; either the bad ones poison rank 1, or nobody takes them."""
    said = []
    for step in range(STEPS):
        poison = BAD_STEPS.get(step)
        if leave_out and poison:
            continue
        before = _state(engine)
        for micro in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            inputs = torch.randn(1, 8, generator=generator)
            if rank == 1 and poison == ("early micro-batch", "last micro-batch")[micro]:
                inputs[0, 0] = float("nan")
            nan_gradient = rank == 1 and micro == 0 and poison == "gradient alone"
            engine.set_gradient_accumulation_boundary(micro == ACCUMULATION - 1)
            loss = engine(inputs, nan_gradient=nan_gradient)
            if rank == 1 and micro == 0 and poison == "loss alone":
                loss = loss + float("inf")
            guard.update_params(loss)
        moved = not torch.equal(before, _state(engine))
        said.append((guard.skipped, moved, guard.bad_losses, engine.optimizer.overflow))
    return {"state": _state(engine), "said": said, "counts": (guard.total, guard.in_a_row)}


def _worker(rank: int, folder: str) -> None:
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    # A file, since a free port that is looked up first may be taken before the ranks meet there.
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    torch.set_num_threads(1)
    import gmai_xtuner.plugin  # noqa: F401  (no C++ compiler for DeepSpeed's shared memory)

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for number, engine_name in enumerate(ENGINES):
        for leave_out in (False, True):
            engine = _start(*engine_name)
            guard = StepGuard(Wrapper(engine), MessageHub(f"{number}{leave_out}"))
            results[engine_name, leave_out] = _train(rank, engine, guard, leave_out=leave_out)
            engine.destroy()
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", __name__, folder]
    done = warm.run(command, environment=os.environ, folder=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_bad_step_is_as_if_it_had_never_been(results, engine, rank):
    poisoned, clean = results[rank][engine, False], results[rank][engine, True]
    skipped, moved, bad_losses, overflow = (
        list(column) for column in zip(*poisoned["said"], strict=True)
    )
    assert all(step[1] for step in clean["said"]), "the comparison would be empty"
    # Both ranks leave out the same steps, in which nothing moves; the flag does not stay.
    assert skipped == [True, False] * 4
    assert moved == [not step for step in skipped]
    assert not any(overflow)
    assert poisoned["counts"] == (4, 0)
    # The steps after them start from clean gradients and moments: bit by bit the run without them.
    assert torch.equal(poisoned["state"], clean["state"])
    expected = [[False, False]] * 4
    if rank == 1:
        expected = [[True, False], [False, True], [False, False], [True, False]]
    assert [bad_losses[step] for step in BAD_STEPS] == expected


class Hub(SimpleNamespace):
    def __init__(self, **info) -> None:
        super().__init__(info=info, scalars={})

    def get_info(self, key, default=None):
        return self.info.get(key, default)

    def update_info(self, key, value):
        self.info[key] = value

    def update_scalar(self, key, value):
        self.scalars[key] = value


def test_counts_go_on_where_a_checkpoint_left_them():
    hub = Hub(**{COUNTS: {"total": 5, "in_a_row": 2}})
    engine = SimpleNamespace(optimizer=SimpleNamespace(check_overflow=None))
    guard = StepGuard(SimpleNamespace(model=engine), hub)
    assert (guard.total, guard.in_a_row) == (5, 2)
    assert hub.scalars == {"train/skipped_steps": 5}


def test_an_engine_that_cannot_leave_a_step_out_is_refused():
    engine = SimpleNamespace(optimizer=object())
    with pytest.raises(
        GMAIError, match=r"needs ZeRO stage 1, 2 or 3, got object: take --deepspeed zero1"
    ):
        StepGuard(SimpleNamespace(model=engine), Hub())


def test_negative_bounds_are_refused():
    with pytest.raises(GMAIError, match="at least 0, got -1 and 20"):
        NonFiniteHook(max_in_a_row=-1)


class Checkpoints(StepCheckpointHook):
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stop = SimpleNamespace(ask=self.asked.append)


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Call it for one optimiser step of two micro-batches; ``said`` and ``asked`` are its traces."""
    said: list[str] = []
    monkeypatch.setattr(nonfinite, "warn", said.append)
    checkpoints = Checkpoints()
    runner = SimpleNamespace(iter=0, work_dir=str(tmp_path), hooks=[checkpoints])

    def run(hook: NonFiniteHook, *, bad_losses, total, in_a_row, skipped=True, names=("a", "b")):
        hook._guard = SimpleNamespace(
            skipped=skipped, bad_losses=list(bad_losses), total=total, in_a_row=in_a_row
        )
        for number, name in enumerate(names):
            data = {"ids": [f"toy/{name}{i}" for i in range(15)]}
            hook.after_train_iter(runner, runner.iter, {"data": data})
            if number == 1:
                hook.after_step(runner)
            runner.iter += 1

    run.said, run.asked, run.runner = said, checkpoints.asked, runner
    run.file = tmp_path / "nonfinite.jsonl"
    return run


def test_samples_of_the_bad_micro_batch_are_named(step):
    step(NonFiniteHook(), bad_losses=[False, True], total=1, in_a_row=1)
    (said,) = step.said
    assert "skipped at iteration 2: the loss of micro-batch 2 on rank 0 is not finite" in said
    assert "Samples: toy/b0, toy/b1, " in said
    assert "toy/a" not in said
    (row,) = map(json.loads, step.file.read_text().splitlines())
    assert (row["rank"], row["iteration"], row["loss_finite"]) == (0, 2, False)
    assert row["ids"] == [f"toy/b{i}" for i in range(15)]


def test_a_bad_gradient_alone_names_the_whole_step(step):
    step(NonFiniteHook(), bad_losses=[False, False], total=1, in_a_row=1)
    assert "all its losses are finite, but a gradient is not" in step.said[0]
    assert "toy/a0" in step.said[0]
    assert "and 10 more; all in" in step.said[0]
    assert len(step.file.read_text().splitlines()) == 2


def test_good_steps_say_nothing_and_their_samples_are_forgotten(step):
    hook = NonFiniteHook()
    step(hook, bad_losses=[], total=0, in_a_row=0, skipped=False)
    assert step.said == []
    step(hook, bad_losses=[True, False], total=1, in_a_row=1, names=("c", "d"))
    assert "Samples: toy/c0" in step.said[0]


@pytest.mark.parametrize(
    ("counts", "stops"),
    [((3, 3), False), ((4, 4), True), ((20, 1), False), ((21, 1), True)],
)
def test_past_a_bound_the_run_stops_with_a_checkpoint_and_an_error(step, counts, stops):
    hook = NonFiniteHook(max_in_a_row=3, max_total=20)
    step(hook, bad_losses=[True, False], total=counts[0], in_a_row=counts[1])
    if not stops:
        assert step.asked == []
        hook.after_train(step.runner)
        return
    told = f"{counts[1]} optimiser steps in a row and {counts[0]} in total were not finite"
    assert step.asked == [told]  # StepCheckpointHook writes the checkpoint and ends the loop
    with pytest.raises(
        NonFiniteError, match=rf"^{told}; .*iteration 2 has the weights.*then resume"
    ):
        hook.after_train(step.runner)


def test_a_stop_needs_somebody_who_writes_the_checkpoint():
    with pytest.raises(GMAIError, match=r"needs .*StepCheckpointHook"):
        NonFiniteHook().before_train(SimpleNamespace(hooks=[]))


def test_the_logged_loss_leaves_out_what_is_not_finite(monkeypatch):
    hub = Hub()
    loop = SimpleNamespace(step_end=False)
    runner = SimpleNamespace(
        iter=0,
        max_iters=9,
        hooks=[],
        message_hub=hub,
        train_loop=loop,
        log_processor=SimpleNamespace(),
    )
    hook = ProgressHook()
    for name in ("_is_shown", "is_last_train_iter"):
        monkeypatch.setattr(hook, name, lambda *_: False)
    hook._model_flops, hook._peak_flops = SimpleNamespace(of_batch=lambda data: 0), None
    for weighted_sum in (6.0, float("nan"), 3.0, float("inf")):
        loop.weighted_sum = torch.tensor(weighted_sum)
        data = {
            "num_tokens": 5,
            "capacity": 8,
            "pixel_values": torch.zeros(0),
            "label_weight": 3.0,
            "lengths": [5],
        }
        hook.after_train_iter(runner, 0, {"data": data})
    hook._publish(runner)
    assert hub.scalars["train/loss"] == 1.5


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        _worker, (sys.argv[1],), nprocs=WORLD, start_method="fork"
    )

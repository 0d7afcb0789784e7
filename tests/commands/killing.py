# SPDX-License-Identifier: Apache-2.0

"""Hooks for runs that are killed at an exact moment, draw random numbers, or write down their samples.

A test's config imports this module. ``GMAI_TEST_KILL`` says when, as ``moment:iteration:rank[:signal]``;
``+3`` is the third iteration of this start.
"""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from gmai_xtuner.train import checkpointing

CONFIG = f"""
_base_ = [{str(Path(__file__).parents[2] / "configs/gmai_vl/stage2_deep.py")!r}]
custom_imports = dict(imports=["gmai_xtuner.plugin", "tests.commands.killing"])
custom_hooks = [dict(type="ProgressHook"), dict(type="SeenHook"), dict(type="KillHook")]
"""
"""Of a run that can be killed, whose samples are written down."""
OPTIONS = (
    "train_dataloader.dataset.max_length=160", "train_dataloader.num_workers=0", "model.pretrained_pth=None",
    "model.llm.torch_dtype=float32", "optim_wrapper.optimizer.lr=1e-3", "optim_wrapper.optimizer.eps=1e-4",
    "train_cfg.max_epochs=2", "default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1",
    "default_hooks.sample_answer.interval=0", "optim_wrapper.optimizer.lr_by_part.projector=2e-3",
    "default_hooks.checkpoint.background=False",
)  # fmt: skip


@HOOKS.register_module()
class DropoutHook(Hook):
    """Drops a part of what the projector gives, from torch's global generator, as LoRA's dropout does."""

    def before_train(self, runner) -> None:
        runner.model.module.projector.register_forward_hook(
            lambda module, inputs, output: torch.nn.functional.dropout(output, 0.2)
        )


@HOOKS.register_module()
class SeenHook(Hook):
    """Writes down which samples each rank trains in which optimiser step, before the step is made."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        data = data_batch["data"]
        # A filler keeps a rank in step and teaches nothing.
        row = [runner.train_loop.step + 1, data["ids"] if data["num_tokens"] else []]
        with Path(runner.log_dir, f"seen-{get_rank()}.jsonl").open("a") as file:
            print(json.dumps(row), file=file)


def samples_of_steps(work_dir: Path) -> dict[int, list[str]]:
    """Return the samples of each step; of a step made again after a kill, those of the last time."""
    found: dict[int, list[str]] = {}
    for run in sorted({file.parent for file in work_dir.glob("*/seen-*.jsonl")}):
        rows = [json.loads(line) for file in run.glob("seen-*") for line in file.open()]
        for made in {step for step, _ in rows}:
            found[made] = sorted(name for step, ids in rows if step == made for name in ids)
    return found


@HOOKS.register_module()
class KillHook(Hook):
    """Signals its own process.

    Moments: ``between``: before an iteration, away from any checkpoint; ``writing``: half of this rank's
    optimiser state is in the file, and training has gone on if a thread writes; ``renamed``: the checkpoint
    has its name, the pointer is the old one.
    """

    def before_train(self, runner) -> None:
        self.goes_on = threading.Event()
        moment, iteration, rank, *name = os.environ.get("GMAI_TEST_KILL", "none:0:0").split(":")
        self.moment, self.number = moment, signal.SIGKILL
        self.iteration = int(iteration) + (runner.iter if iteration.startswith("+") else 0)
        if name:
            self.number = signal.Signals[name[0]]
        if get_rank() != int(rank):
            self.moment = "none"
        if self.moment == "writing":
            self._kill_while_writing(runner)
        elif self.moment == "renamed":
            self._kill_before_pointer(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter >= self.iteration:
            self.goes_on.set()
        if self.moment == "between" and runner.iter + 1 == self.iteration:
            self._kill()

    def _kill(self) -> None:
        if self.number == signal.SIGKILL:
            os.kill(os.getpid(), self.number)
        # As a scheduler does it: every process of the job, and from another process.
        workers = [child.pid for child in psutil.Process().children()]
        assert workers, "the test is to signal data-loader workers as well"
        processes = map(str, [*workers, os.getpid()])
        subprocess.run(["kill", "-s", self.number.name.removeprefix("SIG"), *processes], check=True)

    def _kill_while_writing(self, runner) -> None:
        save = torch.save

        def half(state, file, *args, **kwargs):
            save(state, file, *args, **kwargs)
            path = Path(file)
            written = int(path.parent.name.removeprefix("iter_").partition(".")[0])
            if written >= self.iteration and path.name.endswith("_optim_states.pt"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                waits = threading.current_thread() is threading.main_thread()
                if waits or self.goes_on.wait(60):
                    self._kill()

        torch.save = half

    def _kill_before_pointer(self, runner) -> None:
        replace = checkpointing.replace_text

        def killed(file, text):
            if runner.iter + 1 >= self.iteration and Path(file).name == "last_checkpoint":
                self._kill()
            replace(file, text)

        checkpointing.replace_text = killed

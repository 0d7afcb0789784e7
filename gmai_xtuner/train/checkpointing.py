# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that a run can lose nothing by: staged and renamed, found again by themselves.

A checkpoint grows in ``iter_<N>.pth.writing``. When every rank has written its part and all of it is on
disk, a manifest is added, the folder is renamed to ``iter_<N>.pth``, the pointer ``last_checkpoint``
replaced, and only then is an older checkpoint removed. Killed at any moment, a run leaves its last whole
checkpoint where it was. A thread of each rank writes its part (:mod:`gmai_xtuner.train.background`); what
the ranks do together comes at the end of the first optimiser step that finds all parts written.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    barrier,
    broadcast,
    get_rank,
    get_world_size,
)
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from gmai_xtuner.checkpoint.training import (
    MANIFEST,
    POINTER,
    Manifest,
    checkpoints_in,
    files_of_ranks_that_are_wrong,
    sequence_of,
)
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import replace_text, to_disk
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.train.background import BackgroundWriter
from gmai_xtuner.train.hooks import is_due
from gmai_xtuner.train.on_disk import (
    PROBE,
    WRITING,
    is_write_error,
    put_in_place,
    raised_on_all_ranks,
    remove,
)
from gmai_xtuner.train.resume import rank_file, rank_state
from gmai_xtuner.train.signals import STOP_FILE, StopRequest


@HOOKS.register_module()
class StepCheckpointHook(CheckpointHook):
    """Writes checkpoints at the end of an optimiser step, when no gradients are under way.

    Takes the options of mmengine's ``CheckpointHook``; ``interval`` and ``save_begin`` count optimiser steps.
    ``every_minutes``: one is also written at the end of a step when the last, or the start, is so many
    minutes ago by the clock of rank 0; default 0, never.

    ``background``: training waits only while the checkpoint is copied to host memory, which a thread writes;
    the next checkpoint, and the end of the run, wait until it is whole. ``False``: training waits as long.

    At the end of every step the ranks also agree whether to stop (:mod:`gmai_xtuner.train.signals`); if so,
    they write a checkpoint, unless this step has one, and end the run in good order.

    A hook with the methods ``rank_state_dict()`` and ``load_rank_state_dict(state)`` has its state of each
    rank kept in the checkpoint, beside the random generators' (tensors, numbers, strings and plain
    containers only).
    """

    stop: StopRequest

    def __init__(
        self, *args: Any, every_minutes: float = 0, background: bool = True, **kwargs: Any
    ) -> None:
        if every_minutes < 0:
            raise GMAIError(
                f"default_hooks.checkpoint.every_minutes must be above 0, or 0 for never, got {every_minutes}"
            )
        super().__init__(*args, **kwargs)
        self.every_minutes = every_minutes
        self._writer = BackgroundWriter(on=background)
        self._under_way: Callable[[], None] | None = None
        """Makes the checkpoint that is being written whole; on all ranks, or none."""

    def before_train(self, runner: FlexibleRunner) -> None:
        # mmengine would remove by this list; what is too many in the folder goes after a save.
        runner.message_hub.runtime_info.pop("keep_ckpt_ids", None)
        super().before_train(runner)
        if not isinstance(self.file_backend, LocalBackend):
            raise GMAIError(
                f"checkpoints are staged and renamed; that needs a file system, not {self.out_dir}"
            )
        check_work_dir_is_shared(Path(self.out_dir))
        self.stop = StopRequest(Path(runner.work_dir) / STOP_FILE)
        if get_rank() == 0 and self.stop.stop_file.exists():
            self.stop.stop_file.unlink()
            runner.logger.warning(f"Removed {self.stop.stop_file}: it was there before this run")
        self.stop.install()
        self._written = time.monotonic()

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: mmengine's would count micro-batches."""

    def after_step(self, runner: FlexibleRunner) -> None:
        reason = self.stop.agreed()
        self._finish_if_written()
        last = self.is_last_train_iter(runner)
        due = is_due(runner.train_loop.step, self.interval, self.save_begin)
        if self.every_minutes:
            late = torch.tensor([time.monotonic() - self._written >= 60 * self.every_minutes]).int()
            broadcast(late)
            due = due or bool(late)
        if due or reason or (self.save_last and last):
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)
        if reason:
            self.finish()
        if reason and get_rank() == 0:
            self.stop.stop_file.unlink(missing_ok=True)
        if reason and not last:
            runner.train_loop.stop_training = True
            runner.train_loop.stop_reason = reason
            runner.logger.warning(
                f"Stopped after iteration {runner.iter + 1} of {runner.max_iters}, because {reason}. To go "
                f"on, give the same command with --resume {runner.work_dir}"
            )

    def after_train_epoch(self, runner: FlexibleRunner) -> None:
        """Finish the last checkpoint, before a hook's ``after_train`` may raise."""
        self.finish()

    def after_train(self, runner: FlexibleRunner) -> None:
        self.stop.restore()
        super().after_train(runner)

    def _save_checkpoint_with_step(
        self, runner: FlexibleRunner, step: int, meta: dict[str, Any]
    ) -> None:
        """Save as mmengine does, but staged first, and remove the old checkpoints last."""
        folder = Path(self.out_dir)
        self.last_ckpt = str(folder / self.filename_tmpl.format(step))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)

        def then(final: Path) -> None:
            if get_rank() == 0:
                _point_to(final, Path(runner.work_dir) / POINTER)
                if self.max_keep_ckpts > 0:
                    written = filter(
                        sequence_of, checkpoints_in(folder)
                    )  # by runs, not copied there
                    for old in list(written)[self.max_keep_ckpts :]:
                        remove(old)

        self.write(runner, folder, step, then)
        self._written = time.monotonic()

    def save_now(self, runner: FlexibleRunner) -> None:
        """Save between two iterations, where mmengine's own would count the next one already."""
        self._save_checkpoint_with_step(runner, runner.iter, {})

    def write(
        self, runner: FlexibleRunner, folder: Path, step: int, then: Callable[[Path], None]
    ) -> None:
        """Begin to write the checkpoint of iteration ``step`` into a folder, staged; by all ranks.

        The one before is finished first. ``then`` is called, on all ranks, with the checkpoint when it has
        its name: here if it has been written when this returns, or from :meth:`finish`.
        """
        self.finish()
        final = folder / self.filename_tmpl.format(step)
        staging = final.with_name(final.name + WRITING)
        explain = functools.partial(_could_not_be_written, final)
        with raised_on_all_ranks(explain):
            with _raised_after_barriers(runner, self._writer), _in_iteration(runner, step - 1):
                runner.save_checkpoint(
                    str(folder),
                    staging.name,
                    self.file_client_args,
                    save_optimizer=self.save_optimizer,
                    save_param_scheduler=self.save_param_scheduler,
                    meta={"epoch": runner.epoch, "iter": step},
                    by_epoch=self.by_epoch,
                    backend_args=self.backend_args,
                    **self.args,
                )
            if staging.is_dir():
                self._writer.save(torch.save, rank_state(runner), staging / rank_file(get_rank()))

        def finish() -> None:
            with raised_on_all_ranks(explain):
                self._writer.wait()
            publish(staging, final, iteration=step, seed=runner.seed)
            info(f"Checkpoint {final} is whole")
            then(final)

        self._under_way = finish
        self._finish_if_written()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if one is, is whole; by all ranks.

        Raises:
            GMAIError: on all ranks, if one could not write it.
        """
        finish, self._under_way = self._under_way, None
        if finish is not None:
            finish()

    def _finish_if_written(self) -> None:
        if self._under_way is not None:
            written = torch.tensor([self._writer.is_done()]).int()
            all_reduce(written, "min")
            if written:
                self.finish()


def checkpoint_hook(runner: FlexibleRunner, who: str) -> StepCheckpointHook:
    """Return the run's; ``GMAIError`` if there is none, and who needs it."""
    for hook in runner.hooks:
        if isinstance(hook, StepCheckpointHook):
            return hook
    raise GMAIError(f"{who} needs default_hooks.checkpoint, a StepCheckpointHook")


def publish(
    staging: Path, final: Path, *, iteration: int, seed: int | None, patience: float = 60.0
) -> None:
    """Give the folder (or file) that all ranks have written its name. To be called by all ranks.

    An older checkpoint of that name goes.

    Args:
        staging, final: its name until and from now.
        iteration, seed: see :class:`~gmai_xtuner.checkpoint.training.Manifest`.
        patience: seconds that a network file system may take to show rank 0 what the others wrote.

    Raises:
        GMAIError: on all ranks, if the file system refuses or a rank's file is not there; ``staging`` stays,
            and whatever ``final`` was.
    """
    explain = functools.partial(_could_not_be_written, final)
    barrier()
    with raised_on_all_ranks(explain):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # Every node has written pages in its memory, of a shared file system too.
            to_disk(staging)
    with raised_on_all_ranks(explain):
        if get_rank() == 0:
            if staging.is_dir():
                _wait_for_all_files(staging, patience)
                sequence = 1 + max(map(sequence_of, checkpoints_in(final.parent)), default=0)
                # Hidden are what NFS keeps of a deleted file, and a manifest that was never finished.
                written = [file for file in staging.iterdir() if not file.name.startswith(".")]
                files = {file.name: file.stat().st_size for file in sorted(written)}
                manifest = Manifest(iteration, sequence, get_world_size(), seed, files)
                replace_text(staging / MANIFEST, manifest.to_json())
            put_in_place(staging, final)


def _wait_for_all_files(staging: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while wrong := files_of_ranks_that_are_wrong(os.listdir(staging), get_world_size()):
        if time.monotonic() >= deadline:
            raise GMAIError(f"{staging.name} {wrong}, {patience:g} s after all ranks had written")
        time.sleep(1.0)


def _point_to(checkpoint: Path, pointer: Path) -> None:
    """Write mmengine's ``last_checkpoint``; the manifests say which is the newest, so it is no error."""
    try:
        replace_text(pointer, str(checkpoint))
    except OSError as error:
        warn(f"{checkpoint} is whole, but {pointer} could not be written: {error}")


def check_work_dir_is_shared(folder: Path, *, patience: float = 30.0) -> None:
    """Make sure that all ranks write into one folder that suits checkpoints. To be called by all ranks.

    Every rank writes its shard, and DeepSpeed reads all of them. A network file system may take ``patience``
    seconds to show a new file.

    Raises:
        GMAIError: names the ranks that do not see what rank 0 writes, or what the file system refuses.
    """

    def explain(problem: str) -> str:
        return (
            f"checkpoints can't be written to {folder}: {problem}. They are staged, forced to disk "
            "and renamed. Give a --work-dir where that can be done"
        )

    probe = folder / all_gather_object(f"{PROBE}{os.getpid()}-{time.time_ns()}")[0]
    with raised_on_all_ranks(explain):
        if get_rank() == 0:
            staging = probe.with_name(probe.name + WRITING)
            staging.mkdir(parents=True)
            replace_text(staging / MANIFEST, "{}")
            to_disk(staging)
            put_in_place(staging, probe)
    deadline = time.monotonic() + patience
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(1.0)
    blind = [rank for rank, sees in enumerate(all_gather_object(seen)) if not sees]
    if get_rank() == 0:
        remove(probe)
    if blind:
        raise GMAIError(
            f"ranks {blind} do not see what rank 0 writes to {folder}: a checkpoint there would be in "
            "pieces. Give a --work-dir on a file system that all machines share"
        )


@contextmanager
def _in_iteration(runner: FlexibleRunner, iteration: int) -> Iterator[None]:
    """Let the runner, which notes the iteration after its own in a checkpoint, stand in this one."""
    loop, own = runner.train_loop, runner.train_loop._iter
    loop._iter = iteration
    try:
        yield
    finally:
        loop._iter = own


@contextmanager
def _raised_after_barriers(runner: FlexibleRunner, writer: BackgroundWriter) -> Iterator[None]:
    """Give DeepSpeed's files to ``writer``; raise what goes wrong here after the barriers between them.

    ``DeepSpeedEngine.save_checkpoint`` has barriers between its files and at its end, where the other ranks
    would wait for one that raises. A runner without DeepSpeed has none.
    """
    model = getattr(getattr(runner, "strategy", None), "model", None)
    # within mmengine's wrapper: DeepSpeed calls its own methods
    model = getattr(model, "model", model)
    engine = getattr(model, "checkpoint_engine", None)
    kept: list[Exception] = []

    def keeping(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                if not is_write_error(error):
                    raise
                kept.append(error)

        return wrapper

    with ExitStack() as stack:
        if model is not None and engine is not None:
            replaced = (
                (engine, "makedirs", engine.makedirs),
                (engine, "save", functools.partial(writer.save, engine.save)),
                (model, "_copy_recovery_script", model._copy_recovery_script),
                (engine, "commit", lambda tag: True),  # it logs that the checkpoint is ready
            )
            for owner, name, write in replaced:
                setattr(owner, name, keeping(write))
                stack.callback(delattr, owner, name)
        yield
    if kept:
        raise kept[0]


def _could_not_be_written(final: Path, problem: str) -> str:
    """Return the message about a full disk, instead of the name of a C++ file in torch."""
    try:
        room = f"{shutil.disk_usage(final.parent).free / 2**30:.2f} GiB are free there"
    except OSError as error:
        room = f"how much is free there is unknown ({error})"
    return (
        f"the checkpoint {final} could not be written, {room}: {problem}. The older checkpoints are as they "
        "were. Make room (quota, max_keep_ckpts) and give the same command with "
        f"--resume {final.parent}"
    )

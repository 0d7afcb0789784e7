"""Checkpoints that a run can lose nothing by: written aside and renamed, found again by themselves.

A checkpoint grows in ``iter_<N>.pth.writing``. When every rank has written its part and all of it is on
disk, a manifest is added, the folder is renamed to ``iter_<N>.pth``, the pointer ``last_checkpoint``
replaced, and only then is an older checkpoint removed. Killed at any moment, a run leaves its last whole
checkpoint where it was.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, get_rank, get_world_size
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from gmai_xtuner.checkpoint.folder import (
    MANIFEST,
    POINTER,
    Manifest,
    checkpoints_in,
    files_of_ranks_that_are_wrong,
    iteration_of,
    newest_whole,
    read_manifest,
    sequence_of,
    what_is_wrong,
)
from gmai_xtuner.checkpoint.pickles import read_training_state
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import replace_text, to_disk
from gmai_xtuner.train.hooks import is_due
from gmai_xtuner.train.on_disk import (
    REMOVING,
    WRITING,
    is_write_error,
    put_in_place,
    raised_on_all_ranks,
    remove,
)
from gmai_xtuner.train.random_state import random_state, set_random_state
from gmai_xtuner.train.signals import STOP_FILE, StopRequest

PROBE = ".shared-"


@HOOKS.register_module()
class StepCheckpointHook(CheckpointHook):
    """Writes checkpoints at the end of an optimiser step, when no gradients are under way.

    Takes the options of mmengine's ``CheckpointHook``; ``interval`` and ``save_begin`` count optimiser steps.
    At the end of every step the ranks also agree whether to stop (:mod:`gmai_xtuner.train.signals`); if so,
    they write a checkpoint, unless this step has one, and end the run in good order.

    A hook with the methods ``rank_state_dict()`` and ``load_rank_state_dict(state)`` has its state of each
    rank kept in the checkpoint, beside the random generators' (tensors, numbers, strings and plain
    containers only).
    """

    stop: StopRequest

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._not_removed: list[int] = []

    def before_train(self, runner: FlexibleRunner) -> None:
        outdated = self._outdated_at_start(runner)
        super().before_train(runner)
        if not isinstance(self.file_backend, LocalBackend):
            raise GMAIError(
                f"checkpoints are written aside and renamed; that needs a file system, not {self.out_dir}"
            )
        check_work_dir_is_shared(Path(self.out_dir))
        self._remove(outdated)
        self.stop = StopRequest(Path(runner.work_dir) / STOP_FILE)
        if get_rank() == 0 and self.stop.stop_file.exists():
            self.stop.stop_file.unlink()
            runner.logger.warning(f"Removed {self.stop.stop_file}: it was there before this run")
        self.stop.install()

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: mmengine's would count micro-batches."""

    def after_step(self, runner: FlexibleRunner) -> None:
        reason = self.stop.agreed()
        last = self.is_last_train_iter(runner)
        due = is_due(runner.train_loop.step, self.interval, self.save_begin)
        if due or reason or (self.save_last and last):
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)
        if reason and get_rank() == 0:
            self.stop.stop_file.unlink(missing_ok=True)
        if reason and not last:
            runner.train_loop.stop_training = True
            runner.train_loop.stop_reason = reason
            runner.logger.warning(
                f"Stopped after iteration {runner.iter + 1} of {runner.max_iters}, because {reason}. To go "
                f"on, give the same command with --resume {runner.work_dir}"
            )

    def after_train(self, runner: FlexibleRunner) -> None:
        self.stop.restore()
        super().after_train(runner)

    def _save_checkpoint_with_step(
        self, runner: FlexibleRunner, step: int, meta: dict[str, Any]
    ) -> None:
        """mmengine's, but aside first, and with the old checkpoint removed last."""
        final = Path(self.out_dir) / self.filename_tmpl.format(step)
        aside = final.with_name(final.name + WRITING)
        self.last_ckpt = str(final)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        outdated = self._count_in(runner, step)
        with raised_on_all_ranks(functools.partial(_could_not_be_written, final)):
            with _raised_after_barriers(runner):
                runner.save_checkpoint(
                    self.out_dir,
                    aside.name,
                    self.file_client_args,
                    save_optimizer=self.save_optimizer,
                    save_param_scheduler=self.save_param_scheduler,
                    meta=meta,
                    by_epoch=self.by_epoch,
                    backend_args=self.backend_args,
                    **self.args,
                )
            if aside.is_dir():
                torch.save(rank_state(runner), aside / rank_file(get_rank()))
        publish(aside, final, iteration=meta["iter"], seed=runner.seed)
        if get_rank() == 0:
            _point_to(final, Path(runner.work_dir) / POINTER)
        self._remove(outdated)

    def _remove(self, outdated: list[int]) -> None:
        """Remove old checkpoints; the list of kept ones goes on naming those that can't be renamed."""
        if get_rank() == 0:
            self._not_removed = [
                old
                for old in outdated
                if not remove(Path(self.out_dir) / self.filename_tmpl.format(old))
            ]

    def _outdated_at_start(self, runner: FlexibleRunner) -> list[int]:
        """Take out of the list of kept checkpoints what is too many; mmengine's removal may raise."""
        if self.max_keep_ckpts <= 0 or "keep_ckpt_ids" not in runner.message_hub.runtime_info:
            return []
        kept = runner.message_hub.get_info("keep_ckpt_ids")
        runner.message_hub.update_info("keep_ckpt_ids", kept[-self.max_keep_ckpts :])
        return kept[: -self.max_keep_ckpts]

    def _count_in(self, runner: FlexibleRunner, step: int) -> list[int]:
        """Enter ``step`` in the list of kept checkpoints and say which are now too many.

        The checkpoint itself still lists those: should the run die before they are removed, they are when
        the run goes on (:meth:`before_train`).
        """
        if self.max_keep_ckpts <= 0:
            return []
        listed = [*self._not_removed, *self.keep_ckpt_ids]
        kept = [number for number in dict.fromkeys(listed) if number != step] + [step]
        runner.message_hub.update_info("keep_ckpt_ids", list(kept))
        self.keep_ckpt_ids.clear()
        self.keep_ckpt_ids.extend(kept)  # holds max_keep_ckpts, the newest
        return kept[: -self.max_keep_ckpts]


def publish(
    aside: Path, final: Path, *, iteration: int, seed: int | None, patience: float = 60.0
) -> None:
    """Give what all ranks have written its name. To be called by all ranks.

    Args:
        aside: the folder (or file) that was written.
        final: its name from now on. An older checkpoint of that name goes.
        iteration: micro-batches trained.
        seed: seed of the run.
        patience: seconds that a network file system may take to show rank 0 what the others wrote.

    Raises:
        GMAIError: on all ranks, if the file system refuses or a rank's file is not there; ``aside`` stays,
            and whatever ``final`` was.
    """
    explain = functools.partial(_could_not_be_written, final)
    barrier()
    with raised_on_all_ranks(explain):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # Every node has written pages in its memory, of a shared file system too.
            to_disk(aside)
    with raised_on_all_ranks(explain):
        if get_rank() == 0:
            if aside.is_dir():
                _wait_for_all_files(aside, patience)
                sequence = 1 + max(map(sequence_of, checkpoints_in(final.parent)), default=0)
                # Hidden are what NFS keeps of a deleted file, and a manifest that was never finished.
                written = [file for file in aside.iterdir() if not file.name.startswith(".")]
                files = {file.name: file.stat().st_size for file in sorted(written)}
                manifest = Manifest(iteration, sequence, get_world_size(), seed, files)
                replace_text(aside / MANIFEST, manifest.to_json())
            put_in_place(aside, final)


def _wait_for_all_files(aside: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        found = [file.name for file in aside.iterdir()]
        wrong = files_of_ranks_that_are_wrong(found, get_world_size())
        if wrong is None:
            return
        if time.monotonic() >= deadline:
            raise GMAIError(f"{aside.name} {wrong}, {patience:g} s after all ranks had written")
        time.sleep(1.0)


def _point_to(checkpoint: Path, pointer: Path) -> None:
    """Write mmengine's ``last_checkpoint``; the manifests say which is the newest, so it is no error."""
    try:
        replace_text(pointer, str(checkpoint))
    except OSError as error:
        print_log(
            f"{checkpoint} is whole, but {pointer} could not be written: {error}",
            logger="current",
            level=logging.WARNING,
        )


def tidy_up(work_dir: Path) -> None:
    """Finish or remove what a killed run has left half done in its work dir. To be called by all ranks.

    A folder that was written to the end, manifest and all, gets its name; any other goes, or is warned of.

    Raises:
        GMAIError: on all ranks, if the folder can't be read or a whole checkpoint can't be given its name.
    """

    def explain(problem: str) -> str:
        return f"can't tidy up {work_dir} after a stopped run: {problem}"

    with raised_on_all_ranks(explain):
        if get_rank() == 0 and work_dir.is_dir():
            # What is whole first: an older one of its name may be among those to go.
            for left in (
                *sorted(work_dir.glob(f"*{WRITING}")),
                *sorted(work_dir.glob(f"*{REMOVING}")),
            ):
                _tidy_up_one(left)
            for probe in work_dir.glob(f"{PROBE}*"):
                remove(probe)


def _tidy_up_one(left: Path) -> None:
    final = left.with_name(left.name.partition(".pth")[0] + ".pth")
    if iteration_of(final) is None:
        return
    whole = left.suffix == WRITING and (left / MANIFEST).is_file() and not what_is_wrong(left)
    if whole:
        put_in_place(left, final)
        print_log(f"{left.name} was whole: it is {final.name} now", logger="current")
    elif remove(left):
        print_log(f"Removed {left.name}, which a stopped run has left", logger="current")


def choose_checkpoint(runner: FlexibleRunner) -> Path | None:
    """Settle which checkpoint a run goes on from, and tell the runner. To be called by all ranks.

    ``--resume DIR/iter_N.pth`` means that one and no other. ``--resume DIR`` and ``--cfg-options
    resume=True`` mean the newest whole one of a work dir; if that is the run's own and has none yet, the run
    begins at the beginning, so that one command can be given again and again.

    Args:
        runner: before it has loaded anything; its settings are made plain: a path or nothing.

    Returns:
        the checkpoint; ``None`` if the run begins at the beginning.

    Raises:
        GMAIError: the checkpoint that was named is not whole, or another work dir has none.
    """
    own = Path(os.path.abspath(runner.work_dir))
    tidy_up(own)
    if not runner._resume:
        return None
    named = runner._resume if isinstance(runner._resume, str) else runner._load_from
    asked = Path(os.path.abspath(named or own))
    if iteration_of(asked) is not None or asked.is_file():
        found: Path | None = _named_checkpoint(asked)
    else:
        found = _newest_checkpoint(asked)
        if found is None and asked != own:
            raise GMAIError(f"there is no whole checkpoint in {asked} to resume from")
    if found is None:
        print_log(f"No checkpoint in {own} yet: beginning at the beginning", logger="current")
        runner._resume, runner._load_from = False, None
    else:
        print_log(f"Going on from {found}", logger="current")
        runner._resume, runner._load_from = True, str(found)
    return found


def _named_checkpoint(checkpoint: Path) -> Path:
    wrong = what_is_wrong(checkpoint)
    if wrong:
        raise GMAIError(
            f"can't resume from {checkpoint}: it {wrong}. With --resume {checkpoint.parent} the newest "
            "whole checkpoint is taken"
        )
    return checkpoint


def _newest_checkpoint(work_dir: Path) -> Path | None:
    newest, passed_over = newest_whole(work_dir)
    for name, wrong in passed_over.items():
        print_log(f"{work_dir / name} {wrong}; passed over", "current", logging.WARNING)
    return all_gather_object(newest)[0]


def seed_of(path: Path) -> int | None:
    """Seed of the run that wrote a checkpoint, or the newest whole one of a work dir.

    Returns:
        the seed; ``None`` if a work dir has no checkpoint or the checkpoint does not say.

    Raises:
        GMAIError: if ``path`` is named like a checkpoint and is not a whole one.
    """
    if iteration_of(path) is not None or path.is_file():
        checkpoint: Path | None = _named_checkpoint(path)
    else:
        checkpoint, _ = newest_whole(path)
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        return manifest.seed
    file = next(checkpoint.glob("*_model_states.pt")) if checkpoint.is_dir() else checkpoint
    return read_training_state(file, mmap=True)["meta"].get("seed")


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def rank_state(runner: FlexibleRunner) -> dict[str, Any]:
    """What belongs to this rank alone: its random generators and the hooks' counters."""
    hooks = {
        type(hook).__name__: hook.rank_state_dict()
        for hook in runner.hooks
        if hasattr(hook, "rank_state_dict")
    }
    return {"random": random_state(), "hooks": hooks}


def restore_rank_state(runner: FlexibleRunner, checkpoint: Path) -> None:
    """Put back :func:`rank_state`, right before the first iteration of a resumed run."""
    file = checkpoint / rank_file(get_rank())
    if not file.is_file():
        print_log(
            f"{checkpoint} has no {file.name}: random numbers (dropout) go on other than they would have",
            logger="current",
            level=logging.WARNING,
        )
        return
    state = read_training_state(file)
    for hook in runner.hooks:
        if type(hook).__name__ in state["hooks"] and hasattr(hook, "load_rank_state_dict"):
            hook.load_rank_state_dict(state["hooks"][type(hook).__name__])
    set_random_state(state["random"])


def check_work_dir_is_shared(folder: Path, *, patience: float = 30.0) -> None:
    """Make sure that all ranks write into one folder that suits checkpoints. To be called by all ranks.

    Every rank writes its shard; a checkpoint is whole where all of them are, and DeepSpeed reads all of them.

    Args:
        folder: where checkpoints are written.
        patience: seconds that a network file system may take to show a new file.

    Raises:
        GMAIError: names the ranks that do not see what rank 0 writes, or what the file system refuses.
    """

    def explain(problem: str) -> str:
        return (
            f"checkpoints can't be written to {folder}: {problem}. They are written aside, forced to disk "
            "and renamed. Give a --work-dir where that can be done"
        )

    token = all_gather_object(f"{PROBE}{os.getpid()}-{time.time_ns()}")[0]
    probe = folder / token
    with raised_on_all_ranks(explain):
        if get_rank() == 0:
            aside = probe.with_name(probe.name + WRITING)
            aside.mkdir(parents=True)
            replace_text(aside / MANIFEST, "{}")
            to_disk(aside)
            put_in_place(aside, probe)
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
def _raised_after_barriers(runner: FlexibleRunner) -> Iterator[None]:
    """A rank that can't write takes part in DeepSpeed's barriers all the same, and raises after them.

    ``DeepSpeedEngine.save_checkpoint`` has barriers between its files and at its end, where the other ranks
    would wait for this one.

    Args:
        runner: one without DeepSpeed has no such barriers.
    """
    model = getattr(getattr(runner, "strategy", None), "model", None)
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

    writers = [(engine, "makedirs"), (engine, "save"), (model, "_copy_recovery_script")]
    for owner, name in writers if engine is not None else ():
        setattr(owner, name, keeping(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers if engine is not None else ():
            delattr(owner, name)
    if kept:
        raise kept[0]


def _could_not_be_written(final: Path, problem: str) -> str:
    """A full disk says so, instead of the name of a C++ file in torch."""
    try:
        room = f"{shutil.disk_usage(final.parent).free / 2**30:.2f} GiB are free there"
    except OSError as error:
        room = f"how much is free there can't be told ({error})"
    return (
        f"the checkpoint {final} could not be written, {room}: {problem}. The older checkpoints are as they "
        "were. Make room (quota, max_keep_ckpts) and give the same command with "
        f"--resume {final.parent}"
    )

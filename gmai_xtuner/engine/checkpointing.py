"""Checkpoints that a run can lose nothing by: written aside and renamed, found again by themselves.

A checkpoint grows in ``iter_<N>.pth.writing``. When every rank has written its part and all of it is on
disk, a manifest is added, the folder is renamed to ``iter_<N>.pth``, the pointer ``last_checkpoint``
replaced, and only then is an older checkpoint removed. Killed at any moment, a run leaves its last whole
checkpoint where it was.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
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

from gmai_xtuner.engine.random_state import random_state, set_random_state
from gmai_xtuner.engine.signals import STOP_FILE, StopRequest
from gmai_xtuner.errors import GMAIError
from gmai_xtuner.models.checkpoint_folder import (
    MANIFEST,
    POINTER,
    Manifest,
    checkpoints_in,
    iteration_of,
    newest_whole,
    read_manifest,
    sequence_of,
    what_is_wrong,
)

WRITING = ".writing"
REMOVING = ".removing"

TORCH_WRITE_ERRORS = r"inline_container\.cc|iostream error"
"""torch.save on a full disk raises a RuntimeError with one of these, seen with torch 2.11."""


@HOOKS.register_module()
class StepCheckpointHook(CheckpointHook):
    """Writes a due checkpoint at the end of the optimiser step, when no gradients are under way.

    Takes the options of mmengine's ``CheckpointHook``; ``interval`` counts micro-batches. At the end of every
    step the ranks also agree whether to stop (:mod:`gmai_xtuner.engine.signals`); if so, they write a
    checkpoint, unless this step has one, and end the run in good order.

    A hook with the methods ``rank_state_dict()`` and ``load_rank_state_dict(state)`` has its state of each
    rank kept in the checkpoint, beside the random generators' (tensors, numbers, strings and plain
    containers only).
    """

    stop: StopRequest
    _due = False

    def before_train(self, runner: FlexibleRunner) -> None:
        super().before_train(runner)
        if not isinstance(self.file_backend, LocalBackend):
            raise GMAIError(
                f"checkpoints are written aside and renamed; that needs a file system, not {self.out_dir}"
            )
        check_work_dir_is_shared(Path(self.out_dir))
        self.stop = StopRequest(Path(runner.work_dir) / STOP_FILE)
        if get_rank() == 0 and self.stop.stop_file.exists():
            self.stop.stop_file.unlink()
            runner.logger.warning(f"Removed {self.stop.stop_file}: it was there before this run")
        self.stop.install()

    def after_train_iter(
        self,
        runner: FlexibleRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._due |= self.every_n_train_iters(runner, self.interval, self.save_begin)
        if not (data_batch or {})["data"]["step_end"]:
            return
        reason = self.stop.agreed()
        last = self.is_last_train_iter(runner)
        if self._due or reason or (self.save_last and last):
            self._due = False
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)
        if reason and get_rank() == 0:
            self.stop.stop_file.unlink(missing_ok=True)
        if reason and not last:
            runner.train_loop.stop_training = True
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
        with _write_errors_told(final):
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
                replace_text(Path(runner.work_dir) / POINTER, self.last_ckpt)
                for old in outdated:
                    remove(final.with_name(self.filename_tmpl.format(old)))

    def _count_in(self, runner: FlexibleRunner, step: int) -> list[int]:
        """Enter ``step`` in the list of kept checkpoints and say which are now too many.

        The checkpoint itself still lists those: should the run die before they are removed, mmengine does it
        when the run goes on (``CheckpointHook.before_train``).
        """
        if self.max_keep_ckpts <= 0:
            return []
        kept = [number for number in self.keep_ckpt_ids if number != step] + [step]
        runner.message_hub.update_info("keep_ckpt_ids", list(kept))
        self.keep_ckpt_ids.clear()
        self.keep_ckpt_ids.extend(kept)  # holds max_keep_ckpts, the newest
        return kept[: -self.max_keep_ckpts]


def publish(aside: Path, final: Path, *, iteration: int, seed: int | None) -> None:
    """Give what all ranks have written its name. To be called by all ranks.

    Args:
        aside: the folder (or file) that was written.
        final: its name from now on. An older checkpoint of that name goes.
        iteration: micro-batches trained.
        seed: seed of the run.

    Raises:
        OSError: if the file system refuses; ``aside`` stays, and whatever ``final`` was.
    """
    barrier()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # Every node has written pages in its memory, of a shared file system too.
        _to_disk(aside)
    barrier()
    if get_rank() == 0:
        if aside.is_dir():
            sequence = 1 + max(map(sequence_of, checkpoints_in(final.parent)), default=0)
            files = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
            manifest = Manifest(iteration, sequence, get_world_size(), seed, files)
            replace_text(aside / MANIFEST, manifest.to_json())
        remove(final)
        aside.rename(final)
        _directory_to_disk(final.parent)
    barrier()


def tidy_up(work_dir: Path) -> None:
    """Finish or remove what a killed run has left half done in its work dir. To be called by all ranks.

    A folder that was written to the end, manifest and all, gets its name; any other goes.
    """
    if get_rank() == 0 and work_dir.is_dir():
        for left in sorted((*work_dir.glob(f"*{WRITING}"), *work_dir.glob(f"*{REMOVING}"))):
            final = left.with_suffix("")
            if iteration_of(final) is None:
                continue
            if left.suffix == WRITING and (left / MANIFEST).is_file() and not what_is_wrong(left):
                remove(final)
                left.rename(final)
                print_log(f"{left.name} was whole: it is {final.name} now", logger="current")
            else:
                _delete(left)
                print_log(f"Removed {left.name}, which a stopped run has left", logger="current")
    barrier()


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
    return torch.load(file, map_location="cpu", mmap=True)["meta"].get("seed")


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
    state = torch.load(file, map_location="cpu", weights_only=True)
    for hook in runner.hooks:
        if type(hook).__name__ in state["hooks"] and hasattr(hook, "load_rank_state_dict"):
            hook.load_rank_state_dict(state["hooks"][type(hook).__name__])
    set_random_state(state["random"])


def check_work_dir_is_shared(folder: Path, *, patience: float = 30.0) -> None:
    """Make sure that all ranks write into one folder. To be called by all ranks.

    Every rank writes its shard; a checkpoint is whole where all of them are, and DeepSpeed reads all of them.

    Args:
        folder: where checkpoints are written.
        patience: seconds that a network file system may take to show a new file.

    Raises:
        GMAIError: names the ranks that do not see what rank 0 writes.
    """
    token = all_gather_object(f".shared-{os.getpid()}-{time.time_ns()}")[0]
    probe = folder / token
    if get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    barrier()
    deadline = time.monotonic() + patience
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(1.0)
    blind = [rank for rank, sees in enumerate(all_gather_object(seen)) if not sees]
    if get_rank() == 0:
        probe.unlink()
    if blind:
        raise GMAIError(
            f"ranks {blind} do not see what rank 0 writes to {folder}: a checkpoint there would be in "
            "pieces. Give a --work-dir on a file system that all machines share"
        )


def replace_text(file: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part."""
    aside = file.with_name(f".{file.name}{WRITING}")
    with aside.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)
    _directory_to_disk(file.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half removed is never taken for a checkpoint."""
    going = checkpoint.with_name(checkpoint.name + REMOVING)
    try:
        checkpoint.rename(going)
    except FileNotFoundError:
        return
    _delete(going)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        _directory_to_disk(path)


def _directory_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _write_errors_told(final: Path) -> Iterator[None]:
    """A full disk says so, instead of the name of a C++ file in torch."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not (isinstance(error, OSError) or re.search(TORCH_WRITE_ERRORS, str(error))):
            raise
        free = shutil.disk_usage(final.parent).free / 2**30
        raise GMAIError(
            f"the checkpoint {final} could not be written, {free:.2f} GiB are free there: {error}. The older "
            "checkpoints are as they were. Make room (quota, max_keep_ckpts) and give the same command with "
            f"--resume {final.parent}"
        ) from error

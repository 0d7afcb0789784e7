# SPDX-License-Identifier: Apache-2.0

"""What a resumed run begins with: the checkpoint, and the state of each rank, so that dropout goes on too."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.runner import FlexibleRunner

from gmai_xtuner.checkpoint.training import (
    MANIFEST,
    first_rank_file,
    iteration_of,
    newest_whole,
    read_manifest,
    what_is_wrong,
)
from gmai_xtuner.checkpoint.weights import read_training_state
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.train.elastic import read_in_another_layout
from gmai_xtuner.train.on_disk import (
    PROBE,
    REMOVING,
    WRITING,
    put_in_place,
    raised_on_all_ranks,
    remove,
)


def tidy_up(work_dir: Path) -> None:
    """Finish or remove what a killed run has left half done in its work dir. To be called by all ranks.

    A folder that was written to the end, manifest and all, gets its name; any other goes, or is warned of.

    Raises:
        GMAIError: on all ranks, if the folder can't be read or a whole checkpoint can't be given its name.
    """

    message = f"can't tidy up {work_dir} after a stopped run: {{}}"
    with raised_on_all_ranks(message.format):
        if get_rank() == 0 and work_dir.is_dir():
            # What is whole first: an older one of its name may be among those to go.
            for ending in (WRITING, REMOVING):
                for left in sorted(work_dir.glob(f"*{ending}")):
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
        info(f"{left.name} was whole: it is {final.name} now")
    elif remove(left):
        info(f"Removed {left.name}, which a stopped run has left")


def choose_checkpoint(runner: FlexibleRunner) -> Path | None:
    """Settle which checkpoint a run goes on from, and set it in the runner. To be called by all ranks.

    ``--resume DIR/iter_N.pth`` means that one and no other. ``--resume DIR`` and ``--cfg-options
    resume=True`` mean the newest whole one of a work dir; if that is the run's own and has none yet, the run
    begins at the beginning, so that one command can be given again and again.

    The runner has loaded nothing yet; its settings are made plain: a path or nothing.

    Raises:
        GMAIError: the checkpoint that was named is not whole or of another precision, or another work dir has
            none.
    """
    own = Path(os.path.abspath(runner.work_dir))
    tidy_up(own)
    if not runner._resume:
        return None
    named = runner._resume if isinstance(runner._resume, str) else runner._load_from
    asked = Path(os.path.abspath(named or own))
    found, passed_over = _find_checkpoint(asked)
    for name, wrong in passed_over.items():
        warn(f"{asked / name} {wrong}; passed over")
    found = all_gather_object(found)[0]
    if found is None and asked != own:
        raise GMAIError(f"there is no whole checkpoint in {asked} to resume from")
    if found is None:
        info(f"No checkpoint in {own} yet: beginning at the beginning")
        runner._resume, runner._load_from = False, None
    else:
        if changed := check_layout(found, runner):
            info(f"{found} is divided anew: {changed}")
            resume = runner.strategy.resume

            def resume_in_another_layout(*args: Any, **kwargs: Any) -> Any:
                with read_in_another_layout(runner.strategy.model.model, found):
                    return resume(*args, **kwargs)

            runner.strategy.resume = resume_in_another_layout
        info(f"Going on from {found}")
        runner._resume, runner._load_from = True, str(found)
    return found


def check_layout(checkpoint: Path, runner: FlexibleRunner) -> str:
    """Say how a checkpoint's ranks and ZeRO stage differ from those of this run; empty if they don't.

    Raises:
        GMAIError: its precision or its groups of parameters are others, which nothing can bring together.
    """
    file = first_rank_file(checkpoint)
    if file is None:
        return ""
    state = read_training_state(file, mmap=True)
    before, now = state.get("ds_config"), runner.strategy.config
    if not before:
        return ""
    fixed = {"bf16": tuple(bool(c.get("bf16", {}).get("enabled")) for c in (before, now))}
    schedules = state.get("param_schedulers") or [{}]
    if rates := schedules[0].get("base_values"):
        asked = bool(runner.cfg.optim_wrapper.optimizer.get("lr_by_part"))
        fixed["learning rates by part"] = (len(rates) > 1, asked)
    if changed := _changes(fixed):
        raise GMAIError(
            f"this run can't go on from {checkpoint}: {changed}. Resume with the --deepspeed and the config "
            "that it began with, or start a new run from its weights (model.pretrained_pth)"
        )
    return _changes(
        {
            "GPUs": (state.get("dp_world_size"), get_world_size()),
            "ZeRO stage": tuple(
                c.get("zero_optimization", {}).get("stage", 0) for c in (before, now)
            ),
        }
    )


def _changes(pairs: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def _find_checkpoint(path: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the checkpoint that was named, or a work dir's newest whole one and what was passed over."""
    if iteration_of(path) is None and not path.is_file():
        return newest_whole(path)
    if wrong := what_is_wrong(path):
        raise GMAIError(
            f"can't resume from {path}: it {wrong}. With --resume {path.parent} the newest whole checkpoint "
            "is taken"
        )
    return path, {}


def seed_of(path: Path) -> int | None:
    """Return the seed of the run that wrote a checkpoint, or the newest whole one of a work dir.

    ``None`` if there is none, or it does not say; a ``GMAIError`` if what was named is no whole one.
    """
    checkpoint, _ = _find_checkpoint(path)
    if checkpoint is None:
        return None
    if (manifest := read_manifest(checkpoint)) is not None:
        return manifest.seed
    file = first_rank_file(checkpoint) or checkpoint
    return read_training_state(file, mmap=True)["meta"].get("seed")


def rank_file(rank: int) -> str:
    """Return the name of the file in a checkpoint with what belongs to one rank alone."""
    return f"rank_{rank:05d}.pt"


def rank_state(runner: FlexibleRunner) -> dict[str, Any]:
    """Return what belongs to this rank alone: its random generators and the hooks' counters."""
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
        warn(
            f"{checkpoint} has no {file.name}: random numbers (dropout) go on other than they would have"
        )
        return
    state = read_training_state(file)
    for hook in runner.hooks:
        if type(hook).__name__ in state["hooks"] and hasattr(hook, "load_rank_state_dict"):
            hook.load_rank_state_dict(state["hooks"][type(hook).__name__])
    set_random_state(state["random"])


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators and of this process's CUDA device.

    It holds only tensors, numbers, strings and tuples, which a reader that runs nothing can read.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned. A CUDA state is passed over where there is no CUDA."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, *rest = state["numpy"]
    if name != "MT19937" or len(keys) != 624 or not 0 <= position <= 624:
        # numpy does not look, and would read what lies behind its own memory
        raise GMAIError("the state of numpy's random numbers is damaged: copy the checkpoint again")
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the generators back after the block, so that training does not notice what was drawn in it.

    For validation and sample answers: a resumed run may not repeat those of the iteration at which it begins.
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)

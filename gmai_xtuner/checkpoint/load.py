"""Weights of an earlier stage: which checkpoint is meant, and into which parts of the model they go."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import nn

from gmai_xtuner.checkpoint.folder import iteration_of, newest_whole, what_is_wrong
from gmai_xtuner.checkpoint.weight_files import shorten
from gmai_xtuner.core.errors import ModelLoadError


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` means.

    Args:
        path: a ``.pth`` file, a DeepSpeed checkpoint directory, or a work dir, whose newest whole
            checkpoint is meant (:func:`~gmai_xtuner.checkpoint.folder.newest_whole`); broken ones
            that are newer are named in a warning.

    Raises:
        ModelLoadError: if there is none, or the one that was named is not whole; says what is wrong.
    """
    path = Path(path)
    if path.is_file() or iteration_of(path) is not None or any(path.glob("*_model_states.pt")):
        wrong = what_is_wrong(path)
        if wrong:
            raise ModelLoadError(f"checkpoint {str(path)!r} {wrong}. Take another one")
        return path
    if not path.is_dir():
        raise ModelLoadError(
            f"there is no checkpoint or work dir {str(path)!r}. Name a work dir, or an iter_N.pth in it: to "
            "convert, as the command's CHECKPOINT; to train, as GMAI_STAGE1 (stage 2) or GMAI_STAGE2 "
            "(stage 3), once the stage before is trained"
        )
    newest, passed_over = newest_whole(path)
    for name, wrong in passed_over.items():
        print_log(f"{path / name} {wrong}; passed over", logger="current", level=logging.WARNING)
    if newest is None:
        broken = f" that is whole: {', '.join(passed_over)} can't be used" if passed_over else ""
        raise ModelLoadError(
            f"work dir {str(path)!r} has no checkpoint (no iter_N.pth){broken}. Did that stage finish?"
        )
    return newest


def load_checkpoint_state(path: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a checkpoint: a ``.pth`` file or a DeepSpeed directory of any ZeRO stage."""
    from xtuner.model.utils import guess_load_checkpoint

    checkpoint = resolve_checkpoint(path)
    state = dict(guess_load_checkpoint(str(checkpoint)))
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelLoadError(f"{str(checkpoint)!r} holds no model weights")
    return state


def load_parts(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    required: Iterable[str],
    source: str,
) -> list[str]:
    """Load whole parts (``llm``, ``visual_encoder``, ``projector``) of a model, strictly.

    A stage saves only what it trained, so a checkpoint may lack a part; but a part that is there must
    be there whole, and nothing may be left over.

    Args:
        model: the model; its direct children are the parts.
        state: keys ``<part>.<name>``.
        required: parts that the checkpoint must have.
        source: where ``state`` comes from, for the messages.

    Returns:
        names of the parts that were loaded.

    Raises:
        ModelLoadError: names the unexpected, missing or misshapen keys. Nothing is loaded then.
    """
    keys = model_keys(model)
    own = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in keys
    }
    unexpected = set(state) - set(own)
    if unexpected:
        raise ModelLoadError(
            f"{source} has {len(unexpected)} unexpected keys: {shorten(sorted(unexpected))}. "
            "Was it made with another geometry or another config?"
        )
    present = {key.split(".", 1)[0] for key in state}
    absent = set(required) - present
    if absent:
        raise ModelLoadError(
            f"{source} has no weights of {shorten(sorted(absent))}, which this stage starts from "
            f"(it has {shorten(sorted(present))}). Is it the checkpoint of the right stage?"
        )
    missing = {key for key in own if key.split(".", 1)[0] in present} - set(state)
    if missing:
        raise ModelLoadError(f"{source} lacks {len(missing)} keys: {shorten(sorted(missing))}")
    misshapen = [
        f"{key} ({tuple(state[key].shape)}, the model has {full_shape(own[key])})"
        for key in state
        if tuple(state[key].shape) != full_shape(own[key])
    ]
    if misshapen:
        raise ModelLoadError(f"{source} does not fit the model: {shorten(sorted(misshapen))}")
    for key, value in state.items():
        _copy(own[key], value)
    return sorted(present)


def check_trained_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, source: str
) -> None:
    """Whether a checkpoint is one of the config that a model was built from; by names and shapes.

    Args:
        model: on any device; what its stage trains requires gradients.
        state: the checkpoint, names as in the model; it may have more than what the stage trains.
        source: where it comes from, for the messages.

    Raises:
        ModelLoadError: names the missing, unexpected or misshapen keys.
    """
    own = dict(model.named_parameters())
    remedy = "Use the config of the stage that made the checkpoint, with the same bases"
    learnt = sorted(name for name, value in own.items() if value.requires_grad)
    if missing := [name for name in learnt if name not in state]:
        raise ModelLoadError(
            f"{source} has no weights for {len(missing)} of {len(learnt)} parameters that this config "
            f"trains: {shorten(missing, limit=4)}. {remedy}"
        )
    if unexpected := sorted(set(state) - set(own)):
        raise ModelLoadError(
            f"{source} has {len(unexpected)} weights that this config's model does not have: "
            f"{shorten(unexpected, limit=4)}. {remedy}"
        )
    misshapen = [
        f"{name} {tuple(value.shape)} instead of {full_shape(own[name])}"
        for name, value in sorted(state.items())
        if tuple(value.shape) != full_shape(own[name]) and not hasattr(own[name], "quant_state")
    ]
    if misshapen:
        raise ModelLoadError(
            f"{source} is of another geometry in {len(misshapen)} weights: "
            f"{shorten(misshapen, limit=4)}. {remedy}"
        )


def model_keys(model: nn.Module) -> set[str]:
    """Names in the full state dict, whatever a stage chooses to save."""
    return set(nn.Module.state_dict(model, keep_vars=True))


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of a tensor; of the whole one where ZeRO-3 has partitioned it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                target.copy_(value)
    else:
        target.copy_(value)

"""Weights that a stage does not train and yet must keep: they came with the checkpoint it started from.

A checkpoint holds what its stage trains; the rest is read from the bases again. With LoRA on the vision
tower (or with a frozen tower) in stage 3 that is not enough: the tower underneath is stage 2's, which no
base has. So its weights go along in every checkpoint, 0.3 G parameters, and come out of it by themselves:
``xtuner convert pth_to_hf``, a resumed run and a run that starts there need no other file.

DeepSpeed removes frozen parameters from what it saves, by name; therefore these have a prefix there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gmai_xtuner.checkpoint.pickles import read_training_state
from gmai_xtuner.checkpoint.weight_files import shorten
from gmai_xtuner.core.errors import ModelLoadError

PREFIX = "frozen:"


def without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen weights of a state dict, under their own names."""
    return {
        key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)
    }


def read_frozen(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Frozen weights in a DeepSpeed checkpoint directory; the first rank's file has them."""
    files = (
        checkpoint / "mp_rank_00_model_states.pt",
        checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt",
    )
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    return without_prefix(read_training_state(file, mmap=True)["module"])


def check_same(
    kept: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], *, source: str
) -> None:
    """A resumed run must stand on the frozen weights that it began with.

    Args:
        kept: what this run took from its ``pretrained_pth``.
        saved: what the checkpoint to resume from brings along.
        source: this run's ``pretrained_pth``, for the message.

    Raises:
        ModelLoadError: they differ; names the weights.
    """
    differ = sorted(
        key
        for key in kept.keys() | saved.keys()
        if key not in kept or key not in saved or not torch.equal(kept[key], saved[key])
    )
    if differ:
        raise ModelLoadError(
            f"the run to resume stands on other frozen weights than pretrained_pth={source!r} has now: "
            f"{shorten(differ)}. Give the checkpoint that the run was started from"
        )

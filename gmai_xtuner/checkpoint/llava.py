# SPDX-License-Identifier: Apache-2.0

"""The model that configs name: it starts from the stage before, saves what it trained, and is exported.

A checkpoint holds what its stage trains; the rest is read from the bases again. With LoRA on the vision
tower (or with a frozen tower) in stage 3 that is not enough: the tower underneath is stage 2's, which no
base has. So its weights go along in every checkpoint, 0.3 G parameters, and come out of it by themselves:
``xtuner convert pth_to_hf``, a resumed run and a run that starts there need no other file. DeepSpeed removes
frozen parameters from what it saves, by name; therefore these have a prefix there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dist import get_rank
from mmengine.registry import MODELS
from torch import nn
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.export import save_xtuner_layout
from gmai_xtuner.checkpoint.export_gguf import write_gguf
from gmai_xtuner.checkpoint.export_huggingface import save_whole_model, write_llava
from gmai_xtuner.checkpoint.layouts import is_export, read_export
from gmai_xtuner.checkpoint.training import (
    check_stage,
    check_trained_state,
    first_rank_file,
    load_checkpoint_state,
    load_parts,
    resolve_checkpoint,
)
from gmai_xtuner.checkpoint.weights import read_training_state
from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.core.hub import shorten
from gmai_xtuner.data.log import info
from gmai_xtuner.model.llava import LLaVA
from gmai_xtuner.model.lora import plain_key, split_adapters

PREFIX = "frozen:"


def without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen weights of a state dict, under their own names."""
    return {
        key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)
    }


def read_frozen(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Frozen weights in a DeepSpeed checkpoint directory; the first rank's file has them."""
    file = first_rank_file(checkpoint)
    if file is None:
        return {}
    return without_prefix(read_training_state(file, mmap=True)["module"])


def check_convertible(
    model: nn.Module, state: Mapping[str, torch.Tensor], path: str, cfg: Mapping[str, Any]
) -> None:
    """Check that the model of ``cfg`` takes all that a checkpoint has learnt, before anything is exported.

    ``path`` is of the checkpoint, whose content ``state`` is, or of its work dir. The config of another
    stage, or of another geometry, is a ``ModelLoadError``.
    """
    checkpoint = resolve_checkpoint(path)
    # A single file does not say what it has not trained; of that, the tower is exported in any case.
    frozen = (
        read_frozen(checkpoint)
        if checkpoint.is_dir()
        else [key for key in state if key.startswith("visual_encoder.")]
    )
    check_trained_state(model, state, source=str(checkpoint), brought_along=frozen)
    check_stage(checkpoint, str(cfg["train_dataloader"]["dataset"].get("stage")))


SAVE_FORMATS: dict[str, Any] = {
    "xtuner": save_xtuner_layout,
    "huggingface": partial(save_whole_model, write=write_llava),
    "gguf": partial(save_whole_model, write=write_gguf),
}


@MODELS.register_module()
@BUILDER.register_module()
class GMAILLaVAModel(LLaVA):
    """:class:`~gmai_xtuner.model.llava.LLaVA` with its life on disk.

    Args:
        llm, visual_encoder, options: as for ``LLaVA``.
        pretrained_pth: file, DeepSpeed directory or work dir of the stage before, or of a run with the
            same adapters, which are continued; or a folder of exported weights, in xtuner's layout or a
            whole LLaVA (:mod:`gmai_xtuner.checkpoint.layouts`).
        pretrained_parts: parts that ``pretrained_pth`` must contain; a checkpoint of an earlier stage
            than the one meant is refused.

    Raises:
        ModelLoadError: a checkpoint does not fit; names the keys.
        GMAIError: isolation of the conversations of a pack can't be had.
    """

    def __init__(
        self,
        llm: Mapping[str, Any] | nn.Module,
        visual_encoder: Mapping[str, Any] | nn.Module,
        *,
        pretrained_pth: str | None = None,
        pretrained_parts: Sequence[str] | None = ("projector",),
        **options: Any,
    ) -> None:
        self.pretrained_pth, self._required = pretrained_pth, set(pretrained_parts or ())
        self._kept: dict[str, torch.Tensor] = {}
        super().__init__(llm, visual_encoder, **options)

    def start(self) -> tuple[Mapping[str, torch.Tensor], str]:
        """Load all but the adapters of ``pretrained_pth``, and keep the frozen weights that no base has."""
        if (source := self.pretrained_pth) is None:
            return super().start()
        state = read_export(source, self) if is_export(source) else load_checkpoint_state(source)
        base, adapters = split_adapters(state)
        check_no_language_model(self, base, source=source)
        with_adapters = {key.split(".", 1)[0] for key in adapters}
        parts = load_parts(self, base, required=self._required - with_adapters, source=source)
        loaded = sorted({*parts, *(f"adapters of {part}" for part in with_adapters)})
        info(f"Loaded {', '.join(loaded)} from {source}")
        if self.freeze_visual_encoder and get_rank() == 0:
            # Copies: what was read may be views of the whole checkpoint.
            self._kept = {
                key: value.detach().clone()
                for key, value in base.items()
                if key.startswith("visual_encoder.")
            }
        return adapters, source

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What learns, and the frozen weights that no base has (see the module)."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        own = dict(self.named_parameters(remove_duplicate=False))
        learns = {prefix + name for name, parameter in own.items() if parameter.requires_grad}
        for key in [key for key in state if key.startswith(prefix) and key not in learns]:
            del state[key]
        names = {plain_key(name): name for name in own} if self._kept else {}
        for key, value in self._kept.items():
            state[prefix + PREFIX + names[key]] = value
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what :meth:`state_dict` gives, as a resumed run does.

        Raises:
            ModelLoadError: this run stands on other frozen weights.
        """
        if get_rank() == 0:
            kept, saved = self._kept, without_prefix(state_dict)
            saved = {plain_key(key): value for key, value in saved.items()}
            both = [key for key in kept if key in saved and torch.equal(kept[key], saved[key])]
            if differ := sorted((kept.keys() | saved.keys()) - set(both)):
                raise ModelLoadError(
                    "the run to resume stands on other frozen weights than "
                    f"pretrained_pth={str(self.pretrained_pth)!r} has now: {shorten(differ)}. Give the "
                    "checkpoint that the run was started from"
                )
        rest = {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}
        return super().load_state_dict(rest, strict=strict, assign=assign)

    def to_hf(
        self,
        cfg: ConfigDict,
        save_dir: str,
        fp32: bool = False,
        save_pretrained_kwargs: Mapping[str, Any] | None = None,
        save_format: str = "xtuner",
    ) -> None:
        """Write an export in one of :data:`SAVE_FORMATS`; ``xtuner convert pth_to_hf`` calls this."""
        if save_format not in SAVE_FORMATS:
            raise GMAIError(
                f"--save-format {save_format} is not supported; use {' or '.join(SAVE_FORMATS)}"
            )
        SAVE_FORMATS[save_format](
            self, cfg, save_dir, fp32=fp32, save_kwargs=dict(save_pretrained_kwargs or {})
        )


def check_no_language_model(model: Any, base: Mapping[str, Any], *, source: str) -> None:
    """Refuse to start a stage that trains no language model from a checkpoint that has one.

    It would have to copy it into each of its checkpoints.
    """
    if model.freeze_llm and any(key.startswith("llm.") for key in base):
        raise ModelLoadError(
            f"{source} has a whole language model, which this stage does not train. Convert that stage "
            "(xtuner convert pth_to_hf) and name what it exports as the base (GMAI_LLM)"
        )

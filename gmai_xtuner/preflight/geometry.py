# SPDX-License-Identifier: Apache-2.0

"""The sizes on which activations depend, read from the model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class LanguageGeometry:
    """Sizes of the language model.

    Args:
        hidden: width ``D``.
        intermediate: width ``I`` of the gated feed-forward.
        layers: decoder layers.
        heads: query heads.
        key_value_heads: key and value heads.
        head: width of a head.
        vocabulary: ids ``V``.
        base_learns: whether the matrices of the decoder layers have gradients of their own.
        adapters_learn: whether LoRA adapters beside them have.
        adapter_dropout: whether these drop inputs, of which they then keep copies.
        head_learns: whether the language-model head has a gradient.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    base_learns: bool
    adapters_learn: bool
    adapter_dropout: bool
    head_learns: bool


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """Sizes of the vision tower.

    Args:
        hidden: width ``C``.
        intermediate: width of the feed-forward.
        layers: layers that run (up to the selected hidden state).
        heads: of the attention.
        patches: tokens of an image, ``P``; the class token comes on top.
        image_size: side in pixels.
        learns: whether gradients go through it.
        adapter_dropout: whether LoRA adapters on it drop inputs.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    patches: int
    image_size: int
    learns: bool
    adapter_dropout: bool


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the whole model, and how it is run.

    Args:
        language: the language model.
        vision: the vision tower.
        projector_depth: linear layers of the projector.
        checkpointing: activations are recomputed in the backward pass.
        recomputed_layers: layers of the language model that are.
        kept_layers: those that keep all that they need.
        loss_chunk_size: tokens for which logits exist at a time.
    """

    language: LanguageGeometry
    vision: VisionGeometry
    projector_depth: int
    checkpointing: bool
    recomputed_layers: int
    kept_layers: int
    loss_chunk_size: int


def read_geometry(model: Any, *, recomputed_layers: int | None = None) -> Geometry:
    """Sizes of a :class:`gmai_xtuner.checkpoint.llava.GMAILLaVAModel` on any device.

    Args:
        model: the model.
        recomputed_layers: the option that it was built with.
    """
    llm, tower = model.llm.config, model.visual_encoder.config
    if not model.use_activation_checkpointing:
        recomputed_layers = 0
    elif recomputed_layers is None:
        recomputed_layers = llm.num_hidden_layers
    learning = {name for name, value in model.llm.named_parameters() if value.requires_grad}
    layers = {name for name in learning if ".layers." in name}
    linears = [module for module in model.projector.modules() if isinstance(module, nn.Linear)]
    depth = range(tower.num_hidden_layers + 1)[model.visual_select_layer]
    return Geometry(
        language=LanguageGeometry(
            hidden=llm.hidden_size,
            intermediate=llm.intermediate_size,
            layers=llm.num_hidden_layers,
            heads=llm.num_attention_heads,
            key_value_heads=llm.num_key_value_heads,
            head=llm.hidden_size // llm.num_attention_heads,
            vocabulary=llm.vocab_size,
            base_learns=any("lora_" not in name for name in layers),
            adapters_learn=any("lora_" in name for name in layers),
            adapter_dropout=_drops(model.llm),
            head_learns=any("lm_head" in name for name in learning),
        ),
        vision=VisionGeometry(
            hidden=tower.hidden_size,
            intermediate=tower.intermediate_size,
            layers=depth,
            heads=tower.num_attention_heads,
            patches=(tower.image_size // tower.patch_size) ** 2,
            image_size=tower.image_size,
            learns=any(value.requires_grad for value in model.visual_encoder.parameters()),
            adapter_dropout=_drops(model.visual_encoder),
        ),
        projector_depth=len(linears),
        checkpointing=model.use_activation_checkpointing,
        recomputed_layers=recomputed_layers,
        kept_layers=llm.num_hidden_layers - recomputed_layers,
        loss_chunk_size=model.loss_chunk_size,
    )


def _drops(part: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Dropout) and module.p > 0
        for name, module in part.named_modules()
        if ".lora_dropout." in name
    )

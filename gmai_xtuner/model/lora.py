# SPDX-License-Identifier: Apache-2.0

"""LoRA on the language model and on the vision tower, by peft; QLoRA's 4-bit base weights, by bitsandbytes.

Adapters are injected: the model stays a ``LlamaForCausalLM`` or transformers' tower, whose linear layers
are peft's, so that attention, loss head, DeepSpeed and generation see no difference. (``PeftModel``, which
xtuner's ``LLaVAModel`` wraps around it, would move every attribute.) A weight ``...q_proj.weight`` becomes
``...q_proj.base_layer.weight``, beside ``...q_proj.lora_A.default.weight`` and ``lora_B``.

LoRA: Hu et al. 2021, arXiv 2106.09685: ``W x + (alpha / r) B A x`` with ``B = 0`` at the start. QLoRA:
Dettmers et al. 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from xtuner.registry import BUILDER

from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.core.hub import shorten

ADAPTER = "default"
"""peft's name of the only adapter, a part of its keys."""

_SUPPORTED = """
r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
alpha_pattern use_rslora init_lora_weights task_type
peft_type peft_version base_model_name_or_path inference_mode runtime_config
"""
SUPPORTED = frozenset(_SUPPORTED.split())
"""What may be set in a ``LoraConfig``; the rest must keep its default. The last line peft writes itself."""

#: Starts that leave the base weights as they are; others (pissa, olora, ...) rewrite them.
SUPPORTED_STARTS = (True, False, "gaussian")


def add_adapters(
    part: nn.Module,
    config: Mapping[str, Any] | LoraConfig,
    *,
    option: str,
    num_layers: int | None = None,
) -> None:
    """Put LoRA on linear layers of a model and freeze everything else of it.

    Args:
        part: a ``LlamaForCausalLM`` or ``CLIPVisionModel``, also quantised or on the meta device; it is
            changed.
        config: a ``LoraConfig`` or its config ``dict(type="peft.LoraConfig", r=..., ...)``; it is not
            changed. Without ``target_modules`` (or with ``"all-linear"``): all linear layers of the
            decoder or encoder layers, as in xtuner; so never the language model's head.
        option: name of the option in the model's config, for messages.
        num_layers: layers that run, where the last ones don't; by default adapters go there only.

    Raises:
        GMAIError: an option that is not supported, or a target that is no linear layer of a decoder or
            encoder layer.
    """
    lora = _as_config(config, option)
    linear = linear_layers(part)
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if lora.target_modules is None or lora.target_modules == "all-linear":
        lora.target_modules = kinds
        if num_layers is not None and lora.layers_to_transform is None:
            lora.layers_to_transform = list(range(num_layers))
    elif not isinstance(lora.target_modules, str):
        # peft is content if one of them exists: a misspelt layer would go without an adapter, silently.
        known = [f".{name}" for name in linear]
        lost = [t for t in lora.target_modules if not any(k.endswith(f".{t}") for k in known)]
        if lost:
            raise GMAIError(
                f"{option}: target_modules {shorten(sorted(lost))} can't have an adapter; the linear layers "
                f"inside decoder or encoder layers are {shorten(kinds)}"
            )
    inject_adapter_in_model(lora, part, adapter_name=ADAPTER)
    adapted = adapter_layers(part)
    if strange := sorted(set(adapted) - linear):
        raise GMAIError(
            f"{option}: {shorten(strange)} can't have an adapter; only the linear layers inside decoder "
            f"or encoder layers can: {shorten(kinds)}"
        )
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(is_adapter_key(name))
        if parameter.requires_grad:
            # peft gives them the base's dtype; DeepSpeed takes its fp32 master copy from here.
            parameter.data = parameter.data.float()


def linear_layers(part: nn.Module) -> set[str]:
    """Names of the linear layers inside the decoder or encoder layers."""
    return {
        name
        for name, module in part.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear)
        and ".layers." in f".{name}"
        and ".base_layer" not in name
        and ".lora_" not in name
    }


def adapter_layers(part: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, under the names that they have without."""
    return {name: module for name, module in part.named_modules() if isinstance(module, LoraLayer)}


def is_adapter_key(key: str) -> bool:
    return ".lora_" in key


def plain_key(key: str) -> str:
    """Name of a base weight in the model without adapters."""
    return key.replace(".base_layer.", ".")


def _as_config(config: Mapping[str, Any] | LoraConfig, option: str) -> LoraConfig:
    lora = copy.deepcopy(config)
    if isinstance(lora, Mapping):
        lora = BUILDER.build(lora)
    if type(lora) is not LoraConfig:
        raise GMAIError(f"{option} must be a peft.LoraConfig, got {type(lora).__name__}")
    if lora.init_lora_weights not in SUPPORTED_STARTS:
        raise GMAIError(
            f"{option}: init_lora_weights={lora.init_lora_weights!r} rewrites the base weights, so that "
            f"adapters and base would no longer fit; take one of {SUPPORTED_STARTS}"
        )
    plain = LoraConfig()
    changed = sorted(
        field.name
        for field in dataclasses.fields(lora)
        if field.name not in SUPPORTED and getattr(lora, field.name) != getattr(plain, field.name)
    )
    if changed:
        raise GMAIError(
            f"{option} sets {', '.join(changed)}, which is not supported: only adapters may learn, in "
            f"the form W + scale * B A. Supported are {', '.join(sorted(SUPPORTED))}"
        )
    return lora


def split_adapters(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a checkpoint's weights of the model without adapters, and those of its adapters."""
    adapters = {key: value for key, value in state.items() if is_adapter_key(key)}
    base = {plain_key(key): value for key, value in state.items() if key not in adapters}
    return base, adapters


@torch.no_grad()
def load_adapters(model: nn.Module, adapters: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Continue with the adapters of a checkpoint: all of a part, or none.

    The model's direct children are the parts, and have adapters; keys are
    ``<part>.<layer>.lora_A.default.weight``; ``source`` says where they come from.

    Raises:
        ModelLoadError: another rank, other layers, or a part that has no adapters here. Nothing is
            loaded then.
    """
    own = {name: value for name, value in model.named_parameters() if is_adapter_key(name)}
    for part in sorted({key.split(".", 1)[0] for key in adapters}):
        theirs, ours = (
            {key: value for key, value in weights.items() if key.startswith(f"{part}.")}
            for weights in (adapters, own)
        )
        if not ours:
            raise ModelLoadError(
                f"{source} has LoRA adapters of {part} ({_describe(theirs)}), but the config has no "
                f"{part}_lora. Add it, or convert that stage and start from what it exports, in which "
                "they are merged"
            )
        wrong = set(theirs) ^ set(ours) or {
            key for key in theirs if theirs[key].shape != ours[key].shape
        }
        if wrong:
            raise ModelLoadError(
                f"{source} has other LoRA adapters of {part} than {part}_lora says: "
                f"{_describe(theirs)} instead of {_describe(ours)}, e.g. {shorten(sorted(wrong), limit=2)}. "
                "Take r and target_modules of that run, or start from what it exports"
            )
    for key, value in adapters.items():
        own[key].copy_(value)


def _describe(adapters: Mapping[str, torch.Tensor]) -> str:
    ranks = sorted({value.shape[0] for key, value in adapters.items() if ".lora_A." in key})
    layers = {key.split(".lora_")[0] for key in adapters}
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    return f"r {'/'.join(map(str, ranks))} on {len(layers)} layers, {shorten(kinds)}"


@torch.no_grad()
def merged_weights(part: nn.Module, base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each layer with an adapter and its ``W + scale * B A`` in fp32; ``W`` is that of ``base``."""
    for name, layer in adapter_layers(part).items():
        weight: Any = base.get_submodule(name).weight
        # fp32: a bf16 sum would round most of what the adapter says away.
        yield name, weight.float() + layer.get_delta_weight(ADAPTER).float().to(weight.device)


def remove_adapters(part: nn.Module) -> None:
    """Put the base layers back in the place of peft's; what the adapters say is lost unless merged."""
    for name, layer in adapter_layers(part).items():
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, layer.base_layer)
    if hasattr(part, "peft_config"):
        del part.peft_config


def save_adapter(part: Any, folder: Path) -> None:
    """Write a part's adapter in peft's format, in fp32.

    ``PeftModel.from_pretrained`` and ``xtuner convert merge`` put it on the same model without adapters.
    """
    config = copy.deepcopy(part.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.detach().float().contiguous()
        for name, value in part.named_parameters()
        if is_adapter_key(name)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# --- 4-bit weights ---

TO_CONVERT = (
    "To convert a checkpoint, add --cfg-options model.llm.quantization_config=None: "
    "it is merged into the full-precision base"
)


def quantization_that_runs(config: Mapping[str, Any] | BitsAndBytesConfig) -> BitsAndBytesConfig:
    """The configuration, once it is clear that this machine can run it. No weight has been read by then.

    Raises:
        ModelLoadError: not 4 bit, DeepSpeed ZeRO-3, no CUDA device, or a bitsandbytes that does not
            run with this torch.
    """
    built = BUILDER.build(copy.deepcopy(config)) if isinstance(config, Mapping) else config
    if not isinstance(built, BitsAndBytesConfig) or not built.load_in_4bit:
        raise ModelLoadError(
            "quantization_config must be a transformers.BitsAndBytesConfig with load_in_4bit=True, got "
            f"{config!r}"
        )
    if is_deepspeed_zero3_enabled():
        raise ModelLoadError(
            "DeepSpeed ZeRO-3 can't partition 4-bit weights. Take --deepspeed zero1 or zero2: what "
            "learns is small, and the 4-bit base fits on each GPU"
        )
    if not torch.cuda.is_available():
        raise ModelLoadError(f"4-bit weights need an NVIDIA GPU, and there is none. {TO_CONVERT}")
    try:
        import bitsandbytes as bnb

        bnb.functional.quantize_4bit(torch.zeros(64, device="cuda"), quant_type="nf4")
    except (ImportError, AttributeError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(
            f"bitsandbytes does not run here ({type(error).__name__}: {error}). xtuner 0.2.0 pins "
            f"bitsandbytes 0.45.0, which has kernels up to CUDA 12.6; this torch {torch.__version__} is "
            f"built for CUDA {torch.version.cuda}. Install a newer one beside it: "
            "pip install --no-deps 'bitsandbytes>=0.48'"
        ) from error
    return built


def is_quantized(part: nn.Module) -> bool:
    """Whether a model has 4-bit weights."""
    return bool(getattr(part, "is_loaded_in_4bit", False))

# SPDX-License-Identifier: Apache-2.0

"""Load the bases: InternLM2, InternLM2.5 or Llama as the language model, CLIP or SigLIP as the tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from gmai_xtuner.checkpoint.layouts import is_llava, text_model, vision_model
from gmai_xtuner.checkpoint.weights import add_adapter
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import resolve_directory, vision_config
from gmai_xtuner.model.internlm2 import (
    DTYPES,
    IGNORED_SUFFIX,
    as_dtype,
    check_fit,
    convert_state_dict,
    llama_config,
    own_dtype,
    raise_on_keys,
    shapes_of,
)
from gmai_xtuner.model.llava import building_on_meta
from gmai_xtuner.model.lora import quantization_that_runs

#: Weights of a whole CLIP or SigLIP that the vision tower has no use for; ``position_ids`` is a buffer.
NOT_VISION = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "vision_model.embeddings.position_ids",
)

AS_STORED: Final = "as stored"
"""As a dtype: what the weights have, whatever the config says, so that loading rounds nothing."""


def stored_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return a dtype that holds all weights exactly."""
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes < set(DTYPES) else torch.float32


def load_language_model(
    pretrained_model_name_or_path: str,
    *,
    torch_dtype: str | torch.dtype | None = None,
    quantization_config: Any = None,
    adapter: Path | None = None,
) -> LlamaForCausalLM:
    """Load an InternLM2, InternLM2.5 or Llama checkpoint as a ``LlamaForCausalLM``.

    Of a folder with a whole LLaVA (:mod:`gmai_xtuner.checkpoint.layouts`) the language model is taken.

    Under ``accelerate.init_empty_weights`` only the structure is built and no weight is read.
    Under DeepSpeed ZeRO-3 (``HfDeepSpeedConfig``) the parameters are partitioned as they load.

    Args:
        pretrained_model_name_or_path: a folder in the hub's layout, or a hub name.
        torch_dtype: e.g. ``"bfloat16"``; None keeps the checkpoint's own, :data:`AS_STORED` what its
            weights have.
        quantization_config: 4-bit weights for QLoRA: a ``BitsAndBytesConfig`` or its config
            ``dict(type="transformers.BitsAndBytesConfig", ...)``. Each weight is quantised as it is read,
            so the GPU never holds the model in full precision. On meta it is left out of account: what
            is built there takes full-precision weights.
        adapter: folder of a LoRA adapter of peft on this checkpoint, which is merged.

    Raises:
        ModelLoadError: another model type, a missing or damaged file, a weight that is missing,
            unexpected or of the wrong shape, or 4-bit weights that can't run here. The message names it.
    """
    on_meta = building_on_meta()
    if quantization_config is not None and not on_meta:
        quantization_config = quantization_that_runs(quantization_config)
    directory = resolve_directory(pretrained_model_name_or_path, weights=not on_meta)
    raw, weights = text_model(directory, weights=not on_meta)
    model_type = raw.get("model_type")
    if model_type not in ("internlm2", "llama"):
        raise ModelLoadError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not supported as the "
            "language model; supported are 'internlm2' (InternLM2, InternLM2.5) and 'llama'."
        )
    config = llama_config(raw) if model_type == "internlm2" else LlamaConfig.from_dict(raw)
    dtype = stored_dtype(weights) if torch_dtype == AS_STORED else own_dtype(raw)
    if torch_dtype not in (None, "auto", AS_STORED):
        dtype = as_dtype(torch_dtype)
    if on_meta:
        model = LlamaForCausalLM._from_config(config, torch_dtype=dtype or torch.float32)
    else:
        if adapter is not None:
            weights = add_adapter(weights, adapter)
        if model_type == "internlm2":
            weights = convert_state_dict(weights, config)
        elif raw.get("quantization_config") is None:
            check_fit(weights, shapes_of(LlamaForCausalLM, config), where=str(directory))
        # Given the weights, transformers opens no file by itself.
        model, info = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            torch_dtype=dtype or "auto",
            quantization_config=quantization_config,
            # Parameters take the memory-mapped tensors instead of a second copy; ZeRO-3 has its
            # own way of not holding the whole model.
            low_cpu_mem_usage=None if is_deepspeed_zero3_enabled() else True,
            output_loading_info=True,
        )
        unexpected = [key for key in info["unexpected_keys"] if IGNORED_SUFFIX not in key]
        raise_on_keys(sorted(info["missing_keys"]), sorted(unexpected), str(directory))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    if quantization_config is None:
        model.config.torch_dtype = model.dtype
    model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
    return model


def load_vision_tower(
    pretrained_model_name_or_path: str,
    *,
    torch_dtype: str | torch.dtype | None = None,
    adapter: Path | None = None,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> CLIPVisionModel | SiglipVisionModel:
    """Load the vision tower of a CLIP or SigLIP checkpoint (MedSigLIP is one) or of a whole LLaVA model.

    Under ``accelerate.init_empty_weights`` only the structure is built and no weight is read.

    Args:
        pretrained_model_name_or_path: a folder in the hub's layout or a hub name; a whole CLIP as
            ``openai/clip-vit-large-patch14-336``, or its vision part alone.
        torch_dtype: as for :func:`load_language_model`.
        adapter: folder of a LoRA adapter of peft on this tower, which is merged.
        trained: weights that replace the checkpoint's, all of them.

    Raises:
        ModelLoadError: neither CLIP nor SigLIP, a missing or damaged file, a weight that is missing, of the
            wrong shape, or left over though it belongs to the vision part. The message names it.
    """
    on_meta = building_on_meta()
    directory = resolve_directory(pretrained_model_name_or_path, weights=not on_meta)
    raw = vision_config(directory)
    is_siglip = raw["model_type"] == "siglip_vision_model"
    kind: Any = SiglipVisionModel if is_siglip else CLIPVisionModel
    config = (SiglipVisionConfig if is_siglip else CLIPVisionConfig).from_dict(raw)
    dtype = None if torch_dtype in (None, "auto", AS_STORED) else as_dtype(torch_dtype)
    if on_meta:
        return kind._from_config(config, torch_dtype=dtype or config.torch_dtype)
    # Missing and damaged files, with our messages; nothing is copied.
    weights = vision_model(directory)[1] if trained is None else dict(trained)
    if torch_dtype == AS_STORED:
        dtype = stored_dtype(weights)
    if adapter is not None:
        weights = add_adapter(weights, adapter)
    if dtype is None and (adapter is not None or trained is not None or is_llava(directory)):
        dtype = next(iter(weights.values())).dtype
    own = {key: value for key, value in weights.items() if not key.startswith(NOT_VISION)}
    with torch.random.fork_rng(devices=[]):  # a check must not change the projector's first weights
        check_fit(own, shapes_of(kind, config), where=str(directory))
    # Given the weights, transformers opens no file by itself.
    options = {"state_dict": own, "torch_dtype": dtype or "auto"}
    model = kind.from_pretrained(None, config=config, **options)
    model.name_or_path = str(pretrained_model_name_or_path)
    return model

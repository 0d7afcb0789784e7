"""The vision tower: CLIP checkpoints, whole or the vision part alone.

Shapes: ``S`` image size and ``P`` patch size in pixels; an image gives ``(S // P) ** 2`` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from gmai_xtuner.checkpoint.adapters import add_adapter
from gmai_xtuner.checkpoint.layouts import is_llava, layout_of, vision_model
from gmai_xtuner.checkpoint.weight_files import (
    building_on_meta,
    read_json,
    read_state_dict,
    resolve_directory,
)
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.model.internlm2 import as_dtype, check_loading_info

#: Weights of a whole CLIP that the vision tower has no use for; ``position_ids`` is a buffer.
NOT_VISION = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "vision_model.embeddings.position_ids",
)


def num_image_tokens(vision_config: CLIPVisionConfig) -> int:
    """Patch tokens of one image, without the class token: 576 for ViT-L/14 at 336 pixels."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def load_vision_config(pretrained_model_name_or_path: str) -> CLIPVisionConfig:
    """Configuration of the vision tower of a CLIP checkpoint, without its weights.

    Raises:
        ModelLoadError: no folder or hub name, or no CLIP.
    """
    return _read_config(resolve_directory(pretrained_model_name_or_path, weights=False))


def _read_config(directory: Path) -> CLIPVisionConfig:
    raw = read_json(directory / "config.json")
    if layout_of(raw) is not None:
        raw, _ = vision_model(directory, weights=False)
        if raw["model_type"] == "clip_vision_model":
            return CLIPVisionConfig.from_dict(raw)
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        raise ModelLoadError(
            f"{directory / 'config.json'}: model_type {raw.get('model_type')!r} is not supported "
            "as the vision tower; supported are 'clip' and 'clip_vision_model'."
        )
    return CLIPVisionConfig.from_pretrained(directory)


def load_vision_tower(
    pretrained_model_name_or_path: str,
    *,
    torch_dtype: str | torch.dtype | None = None,
    adapter: Path | None = None,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> CLIPVisionModel:
    """Load the vision tower of a CLIP checkpoint or of a whole LLaVA model.

    Under ``accelerate.init_empty_weights`` only the structure is built and no weight is read.

    Args:
        pretrained_model_name_or_path: a folder in the hub's layout or a hub name; a whole CLIP as
            ``openai/clip-vit-large-patch14-336``, or its vision part alone.
        torch_dtype: e.g. ``"bfloat16"``; None keeps the checkpoint's own.
        adapter: folder of a LoRA adapter of peft on this tower, which is merged.
        trained: weights that replace the checkpoint's, all of them.

    Raises:
        ModelLoadError: no CLIP, a missing or damaged file, a weight that is missing, of the wrong
            shape, or left over though it belongs to the vision part. The message names it.
    """
    on_meta = building_on_meta()
    directory = resolve_directory(pretrained_model_name_or_path, weights=not on_meta)
    config = _read_config(directory)
    dtype = None if torch_dtype in (None, "auto") else as_dtype(torch_dtype)
    if on_meta:
        return CLIPVisionModel._from_config(config, torch_dtype=dtype or config.torch_dtype)
    # Missing and damaged files, with our messages; nothing is copied.
    weights = vision_model(directory)[1] if is_llava(directory) else read_state_dict(directory)
    if trained is not None:
        weights = dict(trained)
    if adapter is not None:
        weights = add_adapter(weights, adapter)
    if dtype is None and (adapter is not None or trained is not None or is_llava(directory)):
        dtype = next(iter(weights.values())).dtype
    try:
        # Given the weights, transformers opens no file by itself.
        model, info = CLIPVisionModel.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            torch_dtype=dtype or "auto",
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelLoadError(
            f"{directory}: the weights don't fit config.json. {error}. "
            "Take config and weights from the same checkpoint."
        ) from error
    check_loading_info(info, where=str(directory), ignored=NOT_VISION)
    model.name_or_path = str(pretrained_model_name_or_path)
    return model

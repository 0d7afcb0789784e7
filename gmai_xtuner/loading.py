"""A folder of weights -> a :class:`~gmai_xtuner.inference.Predictor`, whatever its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from gmai_xtuner.datasets.images import ImageTransform
from gmai_xtuner.datasets.tokenization import ChatTemplate
from gmai_xtuner.errors import ModelLoadError
from gmai_xtuner.inference import Predictor
from gmai_xtuner.models.export import SETTINGS, SETTINGS_FILE
from gmai_xtuner.models.internlm2 import load_language_model
from gmai_xtuner.models.llava import GMAILLaVAModel
from gmai_xtuner.models.tokenizer import load_tokenizer
from gmai_xtuner.models.vision import load_vision_tower


def load_model(
    folder: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load what ``xtuner convert pth_to_hf`` wrote.

    Args:
        folder: the export. Stage 3 has all parts; stages 1 and 2 lack those they did not train.
        llm: the language model's base, where the export has none.
        vision: the vision tower's base, where the export has none.
        dtype: default: bf16 on a GPU, fp32 on the CPU.
        device: default: the GPU if there is one.

    Raises:
        ModelLoadError: a part is missing; says which base to name.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not (folder / "projector").is_dir():
        raise ModelLoadError(
            f"{str(folder)!r} is not an export in xtuner's layout (it has no projector/). "
            "Make one with: xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
        )
    for name in ("llm_adapter", "visual_encoder_adapter"):
        if (folder / name).exists():
            raise ModelLoadError(
                f"{str(folder)!r} has {name}/, which is not merged and would be left out. Merge it with "
                "xtuner convert merge; exports of this project are merged already"
            )
    llm_path = _part(folder, folder / "config.json", llm, "language model", "llm")
    vision_path = _part(
        folder / "visual_encoder", folder / "visual_encoder", vision, "vision tower", "vision"
    )
    file = folder / SETTINGS_FILE
    settings: dict[str, Any] = {**SETTINGS, "visual_select_layer": -2}
    if file.is_file():
        settings.update(json.loads(file.read_text(encoding="utf-8")))
    model = GMAILLaVAModel(
        llm=load_language_model(llm_path, torch_dtype=dtype),
        visual_encoder=load_vision_tower(vision_path, torch_dtype=dtype),
        visual_select_layer=settings["visual_select_layer"],
        use_activation_checkpointing=False,
    )
    model.projector = AutoModel.from_pretrained(folder / "projector", torch_dtype=dtype)
    return Predictor(
        model.to(device),
        tokenizer=load_tokenizer(llm_path),
        template=ChatTemplate.from_xtuner(settings["prompt_template"], add_bos=settings["add_bos"]),
        transform=ImageTransform.from_pretrained(vision_path, mode=settings["image_mode"]),
    )


def _part(inside: Path, proof: Path, base: str | None, what: str, option: str) -> str:
    if proof.exists():
        if base is not None:
            raise ModelLoadError(f"the export has its own {what}; leave {option} out")
        return str(inside)
    if base is None:
        raise ModelLoadError(
            f"the export has no {what} (its stage did not train it); name the base with {option}=..."
        )
    return base

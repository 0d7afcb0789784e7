"""Exports of a tiny model that tells its prompts apart, without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPImageProcessor

from gmai_xtuner.models.export import SETTINGS, SETTINGS_FILE, save_language_model
from gmai_xtuner.models.internlm2 import load_language_model
from gmai_xtuner.models.llava import GMAILLaVAModel
from gmai_xtuner.models.tokenizer import load_tokenizer
from gmai_xtuner.models.vision import load_vision_tower


def write_export(bases: Path, folder: Path) -> Path:
    """All parts in xtuner's layout, as stage 3 has them; ``bases`` are the tiny ones."""
    torch.manual_seed(0)
    llm = load_language_model(str(bases / "llm"), torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(4)  # else it says the same whatever it sees
    model = GMAILLaVAModel(
        llm=llm,
        visual_encoder=load_vision_tower(str(bases / "vision"), torch_dtype=torch.float32),
        use_activation_checkpointing=False,
    )
    load_tokenizer(str(bases / "llm")).save_pretrained(folder)
    save_language_model(model.llm, folder, {})
    model.visual_encoder.save_pretrained(folder / "visual_encoder")
    CLIPImageProcessor.from_pretrained(bases / "vision").save_pretrained(folder / "visual_encoder")
    model.projector.save_pretrained(folder / "projector")
    settings = {**SETTINGS, "visual_select_layer": -2}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    return folder

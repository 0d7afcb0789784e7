# SPDX-License-Identifier: Apache-2.0

"""Exports of a tiny model that tells its prompts apart, without training: by the code of ``convert``."""

from pathlib import Path

import torch
from mmengine.config import ConfigDict

from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel


def write_export(bases: Path, *folders: Path, save_formats: tuple[str, ...] = ("xtuner",)) -> Path:
    """The same weights in each format, as ``xtuner convert pth_to_hf --fp32`` of stage 3 writes them.

    Args:
        bases: the tiny ones.
        folders: one a format.
        save_formats: ``xtuner`` or ``huggingface``.

    Returns:
        the first folder.
    """
    llm_base = {"pretrained_model_name_or_path": str(bases / "llm")}
    vision_base = {"pretrained_model_name_or_path": str(bases / "vision")}
    cfg = ConfigDict(
        tokenizer={"type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer", **llm_base},
        image_processor={"type": "transformers.CLIPImageProcessor.from_pretrained", **vision_base},
        model={"llm": llm_base, "visual_encoder": vision_base},
        train_dataloader={"dataset": {"stage": "stage3"}},
    )
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
    for folder, save_format in zip(folders, save_formats, strict=True):
        model.to_hf(
            cfg=cfg,
            save_dir=str(folder),
            fp32=True,
            save_pretrained_kwargs={"safe_serialization": True},
            save_format=save_format,
        )
    return folders[0]

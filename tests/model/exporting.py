# SPDX-License-Identifier: Apache-2.0

"""Models with something to say, from the tiny bases and the shipped configs, without training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.generate import Predictor
from tests.commands.runner import ROOT


def stage_config(tiny_bases: Path, stage: str, **model: Any) -> Config:
    """A shipped config on the tiny bases, in fp32, starting from them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GMAI_LLM", str(tiny_bases / "llm"))
        patch.setenv("GMAI_VISION", str(tiny_bases / "vision"))
        cfg = Config.fromfile(ROOT / "configs" / "gmai_vl" / f"{stage}.py")
    cfg.model.pretrained_pth = None
    cfg.model.llm.torch_dtype = "float32"
    cfg.model.update(model)
    return cfg


def trained_model(cfg: Config, *, seed: int = 0) -> Any:
    """The model of a config with its trained parts moved away from the bases."""
    torch.manual_seed(seed)
    model = BUILDER.build(cfg.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.startswith("llm.") and ".lora_" not in name:
                # Else it says the same whatever it sees. By 4, logits of fp32 would lie up to 9e-4 from
                # those of fp64, and two right ways of adding up would differ by more than 1e-4; by 2
                # it is 1e-5.
                parameter.mul_(2)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def predictor_of(model: Any, tiny_bases: Path, *, add_bos: bool = True) -> Predictor:
    """The training model, asked by our own code."""
    return Predictor(
        model,
        tokenizer=load_tokenizer(str(tiny_bases / "llm")),
        template=ChatTemplate.from_xtuner("internlm2_chat", add_bos=add_bos),
        transform=ImageTransform.from_pretrained(tiny_bases / "vision"),
    )


def export(model: Any, cfg: Config, folder: Path, **options: Any) -> Path:
    """As ``xtuner convert pth_to_hf ... --save-format huggingface --fp32`` does."""
    arguments = {"fp32": True, "save_format": "huggingface", **options}
    model.to_hf(cfg=cfg, save_dir=str(folder), **arguments)
    return folder

"""Two small models as exports, and a page served by the real command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gmai_xtuner.models.export import save_xtuner_layout
from gmai_xtuner.models.internlm2 import load_language_model
from gmai_xtuner.models.llava import GMAILLaVAModel
from gmai_xtuner.models.vision import load_vision_tower


def write_export(folder: Path, bases: Path, *, seed: int) -> Path:
    """A model that nobody trained, as a stage-3 export: with its own language model and vision tower."""
    torch.manual_seed(seed)
    llm = load_language_model(str(bases / "llm"), torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter in llm.parameters():
            # else it says the same whatever it sees, and so would another seed
            parameter.mul_(4).add_(torch.randn_like(parameter) * 0.02)
    model = GMAILLaVAModel(
        llm=llm,
        visual_encoder=load_vision_tower(str(bases / "vision"), torch_dtype=torch.float32),
        use_activation_checkpointing=False,
    )
    cfg = {
        "model": {},
        "tokenizer": {
            "type": "gmai_xtuner.models.tokenizer.load_tokenizer",
            "pretrained_model_name_or_path": str(bases / "llm"),
        },
        "image_processor": {
            "type": "transformers.CLIPImageProcessor.from_pretrained",
            "pretrained_model_name_or_path": str(bases / "vision"),
        },
        "train_dataloader": {"dataset": {}},
    }
    model.freeze_llm = model.freeze_visual_encoder = False
    save_xtuner_layout(model, cfg, str(folder), fp32=True, save_kwargs={"safe_serialization": True})
    return folder


@pytest.fixture(scope="session")
def models(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two exports that answer differently. Read only."""
    root = tmp_path_factory.mktemp("demo_models")
    return (
        write_export(root / "model_a", tiny_bases, seed=1),
        write_export(root / "model_b", tiny_bases, seed=2),
    )

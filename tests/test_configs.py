"""Every number of the shipped configs against Table 8 and section 4 of the paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config

import gmai_xtuner
from gmai_xtuner.datasets.mixture import load_mixture, select

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "gmai_vl"

STAGES = {
    "stage1_shallow": {
        "freeze": (True, True),
        "lr": 1e-3,
        "batch": (8, 2),
        "stage": "stage1",
        "from": None,
    },
    "stage2_deep": {
        "freeze": (True, False),
        "lr": 1e-4,
        "batch": (4, 4),
        "stage": "stage2",
        "from": ("work_dirs/stage1_shallow", ["projector"]),
    },
    "stage3_instruct": {
        "freeze": (False, False),
        "lr": 1e-5,
        "batch": (4, 4),
        "stage": "stage3",
        "from": ("work_dirs/stage2_deep", ["projector", "visual_encoder"]),
    },
}
VARIABLES = (
    "GMAI_LLM",
    "GMAI_VISION",
    "GMAI_MIXTURE",
    "GMAI_CACHE",
    "GMAI_STAGE1",
    "GMAI_STAGE2",
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_table_8(name):
    cfg, stage = Config.fromfile(FOLDER / f"{name}.py"), STAGES[name]
    assert (cfg.model.freeze_llm, cfg.model.freeze_visual_encoder) == stage["freeze"]
    assert cfg.optim_wrapper.optimizer == {
        "type": "AdamW",
        "lr": stage["lr"],
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
    }
    accumulation = cfg.train_dataloader.batch_sampler.accumulative_counts
    assert (cfg.train_dataloader.batch_size, accumulation) == stage["batch"]
    assert cfg.optim_wrapper.accumulative_counts == accumulation
    assert cfg.optim_wrapper.clip_grad == {"max_norm": 1.0}
    assert cfg.optim_wrapper.dtype == "bfloat16"
    assert cfg.param_scheduler.type == "WarmupCosineLR"
    assert cfg.param_scheduler.warmup_ratio == 0.03
    assert cfg.train_cfg == {"type": "PackedTrainLoop", "max_epochs": 1}
    assert cfg.train_dataloader.dataset.stage == stage["stage"]
    assert (cfg.model.get("pretrained_pth"), cfg.model.get("pretrained_parts")) == (
        stage["from"] or (None, None)
    )


@pytest.mark.parametrize("name", STAGES)
def test_what_all_stages_share(name):
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    data = cfg.train_dataloader.dataset
    assert data.max_length == 2048
    assert data.image_mode == "pad"
    assert data.prompt_template == "internlm2_chat"
    assert data.on_bad_sample == "raise"
    assert cfg.model.visual_select_layer == -2
    assert cfg.model.projector_depth == 2
    assert cfg.model.llm.torch_dtype == "bfloat16"
    for llm in (cfg.model.llm, cfg.tokenizer, data.tokenizer):
        assert llm.pretrained_model_name_or_path == "internlm/internlm2_5-7b-chat"
    vision = "openai/clip-vit-large-patch14-336"
    assert data.vision == vision
    assert cfg.model.visual_encoder.pretrained_model_name_or_path == vision
    assert cfg.image_processor.pretrained_model_name_or_path == vision
    assert cfg.train_dataloader.batch_sampler.weighting == "token"


@pytest.mark.parametrize("name", STAGES)
def test_the_environment_points_at_other_bases_and_data(name, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"/elsewhere/{variable}")
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    data = cfg.train_dataloader.dataset
    assert cfg.model.llm.pretrained_model_name_or_path == "/elsewhere/GMAI_LLM"
    assert data.tokenizer.pretrained_model_name_or_path == "/elsewhere/GMAI_LLM"
    assert data.vision == "/elsewhere/GMAI_VISION"
    assert (data.mixture, data.cache_dir) == ("/elsewhere/GMAI_MIXTURE", "/elsewhere/GMAI_CACHE")
    started = {"stage2_deep": "/elsewhere/GMAI_STAGE1", "stage3_instruct": "/elsewhere/GMAI_STAGE2"}
    assert cfg.model.get("pretrained_pth") == started.get(name)


def test_the_default_mixture_is_table_7():
    cfg = Config.fromfile(FOLDER / "stage1_shallow.py")
    mixture = load_mixture(ROOT / cfg.train_dataloader.dataset.mixture, check_files=False)
    assert len(mixture.entries) == 47
    assert len(select(mixture, stage="stage1")) == 33


@pytest.mark.parametrize("name", gmai_xtuner.compat.DEEPSPEED_NAMES)
def test_deepspeed_names_mean_our_bf16_files(name):
    from xtuner.configs import cfgs_name_path

    path = Path(cfgs_name_path[name])
    assert path.parent == Path(gmai_xtuner.__file__).parent / "engine" / "deepspeed"
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert config["bf16"] == {"enabled": True}
    assert "fp16" not in config
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) is name.endswith("offload")
    assert ("offload_param" in zero) is (name == "zero3_offload")

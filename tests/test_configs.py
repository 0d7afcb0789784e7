# SPDX-License-Identifier: Apache-2.0

"""Every number of the shipped configs against Table 8 and section 4 of the paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config

import gmai_xtuner
from gmai_xtuner.core.config import (
    image_processor_config,
    tokenizer_config,
    train_dataloader_config,
)
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.mixture import load_mixture, select
from gmai_xtuner.train.names import DEEPSPEED_NAMES

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
    "GMAI_BENCHMARKS",
    "GMAI_STAGE",
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
    accumulation = cfg.optim_wrapper.accumulative_counts
    assert (cfg.train_dataloader.batch_size, accumulation) == stage["batch"]
    assert cfg.optim_wrapper.clip_grad == {"max_norm": 1.0}
    assert cfg.optim_wrapper.dtype == "bfloat16"
    assert cfg.param_scheduler.type == "WarmupCosineLR"
    assert cfg.param_scheduler.warmup_ratio == 0.03
    assert cfg.train_cfg == {"type": "PackedTrainLoop", "max_epochs": 1, "val_interval": 125}
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
    assert cfg.model.llm.pretrained_model_name_or_path == "internlm/internlm2_5-7b-chat"
    vision = "openai/clip-vit-large-patch14-336"
    assert cfg.model.visual_encoder.pretrained_model_name_or_path == vision
    hooks = cfg.default_hooks
    assert (hooks.checkpoint.interval, hooks.sample_answer.interval) == (125, 125)
    assert cfg.train_dataloader.batch_sampler.weighting == "token"
    assert cfg.env_cfg.dist_cfg == {"backend": "nccl", "timeout": 3600}
    assert cfg.val_cfg == {
        "type": "HeldOutLoop",
        "at_most": 100,
        "benchmarks": {},
        "benchmark_interval": None,
    }
    assert cfg.test_cfg == {"type": "BenchmarkLoop"}
    assert cfg.test_evaluator == {"type": "BenchmarkScore"}
    assert cfg.test_dataloader.dataset == {
        "type": "BenchmarkQuestions",
        "benchmarks": "data/benchmarks",
    }


@pytest.mark.parametrize("name", STAGES)
def test_the_environment_points_at_other_bases_and_data(name, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"/elsewhere/{variable}")
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    data = cfg.train_dataloader.dataset
    assert cfg.model.llm.pretrained_model_name_or_path == "/elsewhere/GMAI_LLM"
    assert cfg.model.visual_encoder.pretrained_model_name_or_path == "/elsewhere/GMAI_VISION"
    assert (data.mixture, data.cache_dir) == ("/elsewhere/GMAI_MIXTURE", "/elsewhere/GMAI_CACHE")
    assert cfg.test_dataloader.dataset.benchmarks == "/elsewhere/GMAI_BENCHMARKS"
    started = {"stage2_deep": "/elsewhere/GMAI_STAGE1", "stage3_instruct": "/elsewhere/GMAI_STAGE2"}
    assert cfg.model.get("pretrained_pth") == started.get(name)


@pytest.mark.parametrize("name", STAGES)
def test_bases_and_accumulation_are_named_once_and_reach_whoever_needs_them(name):
    text = "".join(
        path.read_text() for path in [FOLDER / f"{name}.py", *(FOLDER / "_base_").glob("*.py")]
    )
    for once in ("{{$GMAI_LLM:", "{{$GMAI_VISION:", "accumulative_counts"):
        assert text.count(once) == 1
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    cfg.merge_from_dict(
        {
            "model.llm.pretrained_model_name_or_path": "other/llm",
            "model.visual_encoder.pretrained_model_name_or_path": "other/tower",
            "optim_wrapper.accumulative_counts": 7,
            "train_dataloader.batch_sampler.weighting": "sample",
        }
    )
    loader = train_dataloader_config(cfg)
    assert loader["dataset"]["tokenizer"] == {
        "type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer",
        "pretrained_model_name_or_path": "other/llm",
        "padding_side": "right",
    }
    assert loader["dataset"]["vision"] == "other/tower"
    assert loader["batch_sampler"]["accumulative_counts"] == 7
    assert loader["collate_fn"] == {"type": "collate_packs", "weighting": "sample"}
    assert tokenizer_config(cfg)["pretrained_model_name_or_path"] == "other/llm"
    assert image_processor_config(cfg)["pretrained_model_name_or_path"] == "other/tower"
    assert "tokenizer" not in cfg.train_dataloader.dataset  # the config itself is left alone


def test_the_accumulation_is_found_where_xtuner_train_has_put_it():
    cfg = Config.fromfile(FOLDER / "stage2_deep.py")
    cfg.optim_wrapper = {"type": "DeepSpeedOptimWrapper", "optimizer": cfg.optim_wrapper.optimizer}
    cfg.strategy = {"type": "DeepSpeedStrategy", "gradient_accumulation_steps": 4}
    assert train_dataloader_config(cfg)["batch_sampler"]["accumulative_counts"] == 4


def test_an_accumulation_that_is_named_twice_must_agree():
    cfg = Config.fromfile(FOLDER / "stage1_shallow.py")
    cfg.merge_from_dict({"train_dataloader.batch_sampler.accumulative_counts": 2})
    assert train_dataloader_config(cfg)["batch_sampler"]["accumulative_counts"] == 2
    cfg.merge_from_dict({"train_dataloader.batch_sampler.accumulative_counts": 3})
    with pytest.raises(GMAIError, match=r"counts is 2, but .*counts is 3\. Leave the second out"):
        train_dataloader_config(cfg)


def test_a_base_that_is_not_named_is_asked_for():
    cfg = Config.fromfile(FOLDER / "stage1_shallow.py")
    del cfg.model.llm["pretrained_model_name_or_path"]
    with pytest.raises(GMAIError, match=r"model\.llm\.pretrained_model_name_or_path must name"):
        train_dataloader_config(cfg)


@pytest.mark.parametrize("name", [None, *STAGES])
def test_small_data_is_a_stage_with_shorter_packs_and_steps(name, monkeypatch):
    if name is not None:
        monkeypatch.setenv("GMAI_STAGE", name)
    expected = Config.fromfile(FOLDER / f"{name or 'stage3_instruct'}.py").to_dict()
    expected["train_dataloader"]["batch_size"] = 1
    expected["train_dataloader"]["dataset"].update(max_length=1024, held_out=0.05)
    expected["optim_wrapper"]["accumulative_counts"] = 2
    expected["train_cfg"].update(max_epochs=10, val_interval=25)
    expected["default_hooks"]["sample_answer"]["interval"] = 25
    expected["default_hooks"]["checkpoint"]["interval"] = 50
    assert Config.fromfile(FOLDER / "variants" / "small_data.py").to_dict() == expected


def test_the_default_mixture_is_table_7():
    cfg = Config.fromfile(FOLDER / "stage1_shallow.py")
    mixture = load_mixture(ROOT / cfg.train_dataloader.dataset.mixture, check_files=False)
    assert len(mixture.entries) == 47
    assert len(select(mixture, stage="stage1")) == 33


@pytest.mark.parametrize("name", DEEPSPEED_NAMES)
def test_deepspeed_names_mean_our_bf16_files(name):
    from xtuner.configs import cfgs_name_path

    path = Path(cfgs_name_path[name])
    assert path.parent == Path(gmai_xtuner.__file__).parent / "train" / "deepspeed"
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert config["bf16"] == {"enabled": True}
    assert "fp16" not in config
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) is name.endswith("offload")
    assert ("offload_param" in zero) is (name == "zero3_offload")


# Variant -> the stage it is a child of, (micro-batch, accumulation), where it starts from, loss chunk.
VARIANTS = {
    "stage1_one_80gb": ("stage1_shallow", (8, 64), None, None),
    "stage2_one_80gb": ("stage2_deep", (4, 128), "stage1_one_80gb", None),
    "stage3_lora_one_80gb": ("stage3_instruct", (4, 128), "stage2_one_80gb", None),
    "stage1_one_24gb": ("stage1_shallow", (2, 256), None, 512),
    "stage2_one_24gb": ("stage2_deep", (2, 256), "stage1_one_24gb", 512),
    "stage3_qlora_one_24gb": ("stage3_instruct", (2, 256), "stage2_one_24gb", 512),
}
ADAPTERS = {
    "freeze_llm": True,
    "freeze_visual_encoder": True,
    "llm_lora": {
        "type": "peft.LoraConfig",
        "r": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "task_type": "CAUSAL_LM",
    },
    "visual_encoder_lora": {
        "type": "peft.LoraConfig",
        "r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
    },
}
FOUR_BIT = {
    "type": "transformers.BitsAndBytesConfig",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def test_every_variant_is_checked():
    assert {path.stem for path in (FOLDER / "variants").glob("*.py")} == {*VARIANTS, "small_data"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_stage_in_these_leaves_only(name):
    parent, (batch_size, accumulation), start, chunk = VARIANTS[name]
    expected = Config.fromfile(FOLDER / f"{parent}.py").to_dict()
    expected["train_dataloader"]["batch_size"] = batch_size
    expected["optim_wrapper"]["accumulative_counts"] = accumulation
    expected["default_hooks"]["checkpoint"]["interval"] = {"80gb": 16, "24gb": 4}[name[-4:]]
    if start:
        expected["model"]["pretrained_pth"] = f"work_dirs/{start}"
    if chunk:
        expected["model"]["loss_chunk_size"] = chunk
    if parent == "stage3_instruct":
        expected["model"].update(ADAPTERS)
        expected["optim_wrapper"]["optimizer"]["lr"] = 1e-4
    if "qlora" in name:
        expected["model"]["llm"]["quantization_config"] = FOUR_BIT
    assert Config.fromfile(FOLDER / "variants" / f"{name}.py").to_dict() == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variants_model_arguments_are_the_models(name):
    import inspect

    from gmai_xtuner.checkpoint.bases import load_language_model
    from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
    from gmai_xtuner.model.llava import LLaVA
    from gmai_xtuner.model.lora import _as_config

    model = Config.fromfile(FOLDER / "variants" / f"{name}.py").model
    known = {*inspect.signature(GMAILLaVAModel).parameters, *inspect.signature(LLaVA).parameters}
    assert set(model) - {"type"} <= known
    assert set(model.llm) - {"type"} <= set(inspect.signature(load_language_model).parameters)
    for option in ("llm_lora", "visual_encoder_lora"):
        if option in model:
            assert _as_config(model[option], option).r == ADAPTERS[option]["r"]

# SPDX-License-Identifier: Apache-2.0

"""Every number of the shipped configs against Table 8 and section 4 of the paper."""

import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
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

GOLDEN: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "configs.yaml").read_text())
FILES = {path.stem: path for path in (*FOLDER.glob("*.py"), *FOLDER.glob("variants/*.py"))}
STAGES = ("stage1_shallow", "stage2_deep", "stage3_instruct")
VARIABLES = (
    *("GMAI_LLM", "GMAI_VISION", "GMAI_MIXTURE", "GMAI_CACHE"),
    *("GMAI_STAGE1", "GMAI_STAGE2", "GMAI_BENCHMARKS", "GMAI_STAGE"),
)


def plain(name: str) -> Any:
    """A shipped config as JSON has it."""
    return json.loads(json.dumps(Config.fromfile(FILES[name]).to_dict()))


def leaves(section: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(section, dict) or not section:
        return {path[1:]: section}
    return {k: v for key in section for k, v in leaves(section[key], f"{path}.{key}").items()}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_every_config_is_checked():
    assert set(FILES) == set(GOLDEN)


def test_the_first_stage_is_table_8_and_section_4():
    config = plain("stage1_shallow")
    assert "pretrained_pth" not in config["model"]
    for path, value in GOLDEN["stage1_shallow"].items():
        assert reduce(getitem, path.split("."), config) == value, path


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "stage1_shallow"])
def test_a_config_differs_from_its_parent_in_these_leaves_only(name):
    own = dict(GOLDEN[name])
    assert leaves(plain(own.pop("_parent"))) | own == leaves(plain(name))


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


@pytest.mark.parametrize("name", STAGES)
def test_small_data_is_a_stage_with_shorter_packs_and_steps(name, monkeypatch):
    monkeypatch.setenv("GMAI_STAGE", name)
    own = dict(GOLDEN["small_data"])
    del own["_parent"]
    assert leaves(plain(name)) | own == leaves(plain("small_data"))


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


@pytest.mark.parametrize("name", FILES)
def test_a_variants_model_arguments_are_the_models(name):
    import inspect

    from gmai_xtuner.checkpoint.bases import load_language_model
    from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
    from gmai_xtuner.model.llava import LLaVA
    from gmai_xtuner.model.lora import _as_config

    model = Config.fromfile(FILES[name]).model
    known = {*inspect.signature(GMAILLaVAModel).parameters, *inspect.signature(LLaVA).parameters}
    assert set(model) - {"type"} <= known
    assert set(model.llm) - {"type"} <= set(inspect.signature(load_language_model).parameters)
    for option in ("llm_lora", "visual_encoder_lora"):
        if option in model:
            assert _as_config(model[option], option).r == model[option].r

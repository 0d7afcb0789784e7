# SPDX-License-Identifier: Apache-2.0

"""Settings that nothing reads, and what is meant by them."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import start
from gmai_xtuner.train.settings import HABITS, arguments_of, unread_settings
from gmai_xtuner.train.start import check_something_learns, setting_problems
from tests.preflight.bases import INTERNLM2_5_7B
from tests.tables import tables

TABLES = tables(__file__)

FOLDER = Path(__file__).parents[2] / "configs" / "gmai_vl"
SHIPPED = sorted(
    str(path.relative_to(FOLDER)) for path in (*FOLDER.glob("*.py"), *FOLDER.glob("variants/*.py"))
)


def problems(name: str = "stage1_shallow.py", *, file: Path = FOLDER, **options) -> list[str]:
    cfg = Config.fromfile(file / name)
    cfg.merge_from_dict(dict(options))
    return unread_settings(cfg, options)


def test_no_shipped_config_is_forgotten():
    assert len(SHIPPED) >= 9


@pytest.mark.parametrize("name", SHIPPED)
def test_no_false_alarm_on_a_shipped_config(name):
    assert problems(name) == []
    assert setting_problems(Config.fromfile(FOLDER / name), {}) == []


@pytest.mark.parametrize(
    ("option", "meant"), TABLES["a_key_that_nothing_reads_is_named_with_the_nearest_right_name"]
)
def test_a_key_that_nothing_reads_is_named_with_the_nearest_right_name(option, meant):
    [told] = problems(**{option: 1})
    assert told.startswith(f"nothing reads {option.split('.')[0]}")
    assert told.endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize("name", sorted(HABITS))
def test_other_programs_names_are_told_what_they_are_here(name):
    [told] = problems(**{name: 1})
    meant = HABITS[name].removeprefix("nothing: ")
    assert told.startswith(f"nothing reads {name}. ")
    assert told.endswith(meant)


def test_what_is_meant_exists():
    """Each path that a habit is told does what it says, in a config that takes it."""
    lora = {"type": "peft.LoraConfig", "r": 8}
    for meant in sorted(set(HABITS.values())):
        path = meant.partition(" ")[0]
        if path.startswith(("--", "nothing")):
            continue
        options = {"model.llm_lora": dict(lora), path: 0.5}
        assert problems(**options) == [], path


def test_an_argument_like_no_other_comes_with_those_that_are_known():
    [told] = problems(**{"train_dataloader.sampler.xyz": 1})
    assert told.endswith("Known are dataset, seed")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("train_cfg.type", "PackedTrainLop", "Did you mean PackedTrainLoop?"),
        ("model", "internlm", "model must be a section of the config"),
        ("train_dataloader.dataset", "data.json", "must be a section of the config"),
    ],
)
def test_a_value_that_builds_nothing(path, value, told):
    [problem] = problems(**{path: value})
    assert told in problem


def test_a_variable_that_the_file_uses_itself_is_none_that_nothing_reads(tmp_path):
    base = FOLDER / "stage1_shallow.py"
    own = tmp_path / "own.py"
    own.write_text(
        f"_base_ = [{str(base)!r}]\n"
        "per_gpu = 4  # a note on noted\n"
        "noted = 'radiology'\n"
        "train_dataloader = dict(batch_size=per_gpu)\n"
    )
    assert [p.split(".")[0] for p in problems("own.py", file=tmp_path)] == ["nothing reads noted"]
    # An override does not reach what was made of the variable.
    own.write_text(own.read_text().replace("noted =", "per_gpu = per_gpu;_noted ="))
    assert any("per_gpu" in told for told in problems("own.py", file=tmp_path, per_gpu=8))


def test_options_that_builders_take_out():
    options = {
        "train_dataloader.num_batch_per_epoch": 3,
        "train_dataloader.pin_memory": True,
        "param_scheduler.convert_to_iter_based": True,
        "default_hooks.timer.priority": "LOW",
    }
    assert problems(**options) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optim_wrapper.clip_grad": None}, "would clip at 1.0"),
        ({"optim_wrapper.dtype": "float16"}, "the DeepSpeed file decides"),
    ],
)
def test_a_value_that_xtuner_would_replace_is_refused(options, told):
    cfg = Config.fromfile(FOLDER / "stage1_shallow.py")
    cfg.merge_from_dict(options)
    [problem] = setting_problems(cfg, options)
    assert told in problem


def test_a_class_of_the_users_own_that_takes_anything_tells_nothing():
    class Mine(Hook):
        def __init__(self, known: int = 1, **rest: int) -> None:
            pass

    assert arguments_of(Mine) is None


@pytest.mark.parametrize(
    ("model", "images", "stops"),
    [
        ({"freeze_llm": True}, 0, True),
        ({"freeze_llm": True}, 1, False),
        ({"freeze_llm": False}, 0, False),
        ({"freeze_llm": True, "llm_lora": {"r": 8}}, 0, False),
    ],
)
def test_text_alone_teaches_a_frozen_language_model_nothing(model, images, stops):
    if stops:
        with pytest.raises(GMAIError, match="nothing would learn"):
            check_something_learns(model, images)
    else:
        check_something_learns(model, images)


# --- A large model does not begin to train on the CPU by accident ---


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Config of a language model of InternLM2.5-7B's size, whose weights are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("GMAI_ALLOW_CPU", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM2_5_7B))
    return {
        "type": "gmai_xtuner.checkpoint.bases.load_language_model",
        "pretrained_model_name_or_path": str(tmp_path),
    }


def test_a_large_model_without_a_gpu_names_driver_and_wheel(large, tmp_path, monkeypatch):
    driver = tmp_path / "version"
    monkeypatch.setattr(start, "DRIVER_FILE", driver)
    with pytest.raises(
        GMAIError, match=r"7\.7 billion weights: no NVIDIA driver.*GMAI_ALLOW_CPU=1"
    ):
        start.check_device(large)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    with pytest.raises(GMAIError, match=r"the NVIDIA driver is 535\.183.*driver 580 or newer"):
        start.check_device(large)


def test_it_trains_there_when_asked(large, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_CPU", "1")
    start.check_device(large)


def test_a_small_model_trains_on_the_cpu(large, tiny_bases):
    start.check_device(large | {"pretrained_model_name_or_path": str(tiny_bases / "llm")})

# SPDX-License-Identifier: Apache-2.0

"""Settings that nothing reads, and what is meant by them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.deepspeed_settings import HABITS
from gmai_xtuner.train.start import check_something_learns, setting_problems
from gmai_xtuner.train.unread import arguments_of, unread_settings

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
    ("option", "meant"),
    [
        ("train_dataloader.batchsize", "train_dataloader.batch_size"),
        ("train_dataloader.dataset.max_lenght", "train_dataloader.dataset.max_length"),
        ("val_dataloader.num_worker", "val_dataloader.num_workers"),
        ("train_dataloader.batch_sampler.weight", "train_dataloader.batch_sampler.weighting"),
        ("train_dataloader.sampler.sed", "train_dataloader.sampler.seed"),
        ("train_dataloader.collate_fn.wieghting", "train_dataloader.collate_fn.weighting"),
        ("train_cfg.max_epoch", "train_cfg.max_epochs"),
        ("val_cfg.at_mots", "val_cfg.at_most"),
        ("optim_wrapper.accumulative_count", "optim_wrapper.accumulative_counts"),
        ("optim_wrapper.optimizer.weight_decya", "optim_wrapper.optimizer.weight_decay"),
        ("optim_wrapper.clip_grad.maxnorm", "optim_wrapper.clip_grad.max_norm"),
        ("param_scheduler.warmup_ration", "param_scheduler.warmup_ratio"),
        ("default_hooks.nonfinite.max_in_row", "default_hooks.nonfinite.max_in_a_row"),
        ("default_hooks.chekpoint.interval", "default_hooks.checkpoint"),
        ("model.freeze_lm", "model.freeze_llm"),
        ("model.llm.torch_dtyp", "model.llm.torch_dtype"),
        ("visualizer.vis_backend", "visualizer.vis_backends"),
        ("visualizer.vis_backends.0.savedir", "visualizer.vis_backends.0.save_dir"),
        ("log_processor.windowsize", "log_processor.window_size"),
        ("env_cfg.mp_cfg.start_method", "env_cfg.mp_cfg.mp_start_method"),
        ("randomness.sed", "randomness.seed"),
        ("optim_wraper.accumulative_counts", "optim_wrapper"),
        ("train_dataloder.batch_size", "train_dataloader"),
        ("work_dirs", "work_dir"),
        # the right name at the wrong level
        ("max_length", "train_dataloader.dataset.max_length"),
        ("freeze_llm", "model.freeze_llm"),
        ("train_dataloader.held_out", "train_dataloader.dataset.held_out"),
        ("train_cfg.interval", "train_cfg.val_interval"),
    ],
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

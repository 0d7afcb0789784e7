from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook

from gmai_xtuner.preflight import option_names
from gmai_xtuner.preflight.findings import Findings
from gmai_xtuner.preflight.run_config import load_run

FOLDER = Path(__file__).parents[2] / "configs" / "gmai_vl"
SHIPPED = sorted(
    str(path.relative_to(FOLDER)) for path in (*FOLDER.glob("*.py"), *FOLDER.glob("variants/*.py"))
)


def findings_of(name: str = "stage1_shallow.py", **options) -> list[tuple[str, str]]:
    run = load_run(str(FOLDER / name), deepspeed="zero2", gpus=1, options=options)
    findings = Findings()
    option_names.check_names(run, findings)
    return [(finding.level, finding.text) for finding in findings.found]


def test_no_shipped_config_is_forgotten():
    assert len(SHIPPED) >= 9


@pytest.mark.parametrize("name", SHIPPED)
def test_no_false_alarm_on_a_shipped_config(name):
    assert findings_of(name) == []
    assert set(Config.fromfile(FOLDER / name)) <= option_names.TOP_LEVEL


@pytest.mark.parametrize(
    ("option", "taker", "meant"),
    [
        ("train_dataloader.batchsize", "DataLoader", "batch_size"),
        ("val_dataloader.num_worker", "DataLoader", "num_workers"),
        ("train_dataloader.batch_sampler.weight", "MicroBatchSampler", "weighting"),
        ("train_dataloader.sampler.sed", "PackSampler", "seed"),
        ("train_cfg.max_epoch", "PackedTrainLoop", "max_epochs"),
        ("val_cfg.at_mots", "HeldOutLoop", "at_most"),
        ("optim_wrapper.accumulative_count", "AmpOptimWrapper", "accumulative_counts"),
        ("optim_wrapper.optimizer.weight_decya", "AdamW", "weight_decay"),
        ("param_scheduler.warmup_ration", "WarmupCosineLR", "warmup_ratio"),
        ("default_hooks.nonfinite.max_in_row", "NonFiniteHook", "max_in_a_row"),
    ],
)
def test_an_argument_that_nothing_takes_fails(option, taker, meant):
    told = f"{option}: {taker} has no such argument. Did you mean {meant!r}?"
    assert findings_of(**{option: 1}) == [("fail", told)]


def test_an_argument_like_no_other_comes_with_those_that_are_known():
    [(level, told)] = findings_of(**{"train_dataloader.sampler.xyz": 1})
    assert (level, told.partition(". ")[2]) == ("fail", "Known: dataset, seed, type")


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("optim_wraper.accumulative_counts", "optim_wrapper"),
        ("train_dataloder.batch_size", "train_dataloader"),
        ("work_dirs", "work_dir"),
    ],
)
def test_a_misspelt_section_is_a_warning(option, meant):
    key = option.partition(".")[0]
    told = f"nothing reads {key!r} in the config. Did you mean {meant!r}?"
    assert findings_of(**{option: 1}) == [("warn", told)]


def test_a_variable_of_the_users_own_is_no_misspelling():
    assert findings_of(batch_size=4, my_lab="radiology", max_length=4096) == []


def test_options_that_builders_take_out():
    assert (
        findings_of(
            **{
                "train_dataloader.num_batch_per_epoch": 3,
                "train_dataloader.pin_memory": True,
                "param_scheduler.convert_to_iter_based": True,
                "default_hooks.timer.priority": "LOW",
                "optim_wrapper.paramwise_cfg": None,
                "optim_wrapper.loss_scale": "dynamic",
            }
        )
        == []
    )


def test_a_class_of_the_users_own_that_takes_anything_tells_nothing():
    class Mine(Hook):
        def __init__(self, known: int = 1, **rest: int) -> None:
            pass

    assert option_names.arguments_of(Mine) is None


def test_what_xtuners_train_reads_is_known():
    from xtuner.tools import train

    source = inspect.getsource(train)
    read = set(re.findall(r'(?:getattr\(cfg, |\bcfg\.get\()"(\w+)"', source))
    of_deepspeed = set(re.findall(r'ds_cfg\.get\(\s*"(\w+)"', source))
    assert len(read) > 4
    assert read - of_deepspeed <= option_names.TOP_LEVEL

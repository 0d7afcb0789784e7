# SPDX-License-Identifier: Apache-2.0

"""What becomes of each key of a DeepSpeed file."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime import constants

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.names import DEEPSPEED_NAMES, packaged_names
from gmai_xtuner.train.settings import (
    CONFIG_DECIDES,
    DROPPED,
    HONOURED,
    REFUSED,
    read,
    settle,
)

CONFIG = {
    "train_dataloader": {"batch_size": 8},
    "optim_wrapper": {"accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}},
}
BF16 = {"bf16": {"enabled": True}}
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 3e-4}}
AUTOMATIC = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}}
ADAM = {"type": "AdamW", "params": {"lr": 3e-4}}


def settled(**content):
    return settle("own.json", {**BF16, **content}, CONFIG)


@pytest.mark.parametrize("name", DEEPSPEED_NAMES)
def test_shipped_files_say_nothing_that_is_not_honoured(name):
    found = read(name, CONFIG)
    assert (found.overruled, found.refused) == ([], [])
    shipped = json.loads(Path(packaged_names()[name]).read_text())
    assert found.settings == {**shipped, "timers": {"throughput": {"enabled": False}}}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("gradient_accumulation_steps", 4, "the config has optim_wrapper.accumulative_counts=2"),
        ("train_micro_batch_size_per_gpu", 1, "the config has train_dataloader.batch_size=8"),
        ("gradient_clipping", 0.3, "the config has optim_wrapper.clip_grad.max_norm=1.0"),
        ("train_batch_size", 64, "it follows from the GPUs"),
        ("steps_per_print", 10, "default_hooks.logger.interval"),
        ("activation_checkpointing", {"profile": True}, "model.use_activation_checkpointing"),
        ("scheduler", AUTOMATIC, "follows the config's param_scheduler"),
        ("fp16", {"enabled": "auto", "loss_scale": 0}, "training is in bf16"),
    ],
)
def test_the_config_overrules_with_one_line(key, value, told):
    found = settled(**{key: value})
    assert found.refused == []
    [line] = found.overruled
    assert line.startswith(key)
    assert told in line
    assert found.settings.get(key, "auto") == "auto"


@pytest.mark.parametrize("key", sorted({*CONFIG_DECIDES, "train_batch_size"}))
def test_auto_is_the_configs_own_value(key):
    found = settled(**{key: "auto"})
    assert (found.overruled, found.refused) == ([], [])
    assert found.settings.get(key) == ("auto" if key in CONFIG_DECIDES else None)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({"scheduler": SCHEDULE}, "param_scheduler.warmup_ratio"),
        ({"optimizer": ADAM}, "optim_wrapper.optimizer.lr"),
        ({"fp16": {"enabled": True}}, "give bf16"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "give bf16"),
        ({"tensorboard": {"enabled": True}}, "vis_backends"),
        ({"checkpoint": {"load_universal": True}}, "default_hooks.checkpoint"),
        ({"zero_optimisation": {"stage": 2}}, "Did you mean 'zero_optimization'?"),
        ({"learning_rate": 1e-4}, "DeepSpeed reads no 'learning_rate'. Remove it"),
        ({"zero_optimization": {"stage": 4}}, "stage: Input should be 0, 1, 2, 3"),
        ({"zero_optimization": {"overlap_com": True}}, "Did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3 alone"),
        ({"zero_optimization": 2}, "must be an object"),
        ({"bf16": {"enabled": "yes"}}, "must be true or false"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "fp32, bf16 or fp16, got 'fp64'"),
    ],
)
def test_what_would_mislead_is_refused_with_the_remedy(content, remedy):
    found = settled(**content)
    [line] = found.refused
    assert remedy in line
    with pytest.raises(GMAIError, match=r"DeepSpeed file own\.json: "):
        found.require()


def test_a_section_that_is_off_asks_for_nothing():
    found = settled(fp16={"enabled": False}, wandb={"enabled": False}, elasticity={})
    assert (found.overruled, found.refused) == ([], [])
    assert found.settings.keys() == {"bf16", "timers", *CONFIG_DECIDES}


@pytest.mark.parametrize("content", [{"bf16": {"enabled": "auto"}}, {"fp16": {"enabled": "auto"}}])
def test_automatic_precision_is_bf16_on_every_device(content):
    assert settle("own.json", content, CONFIG).settings["bf16"] == {"enabled": True}


def test_auto_inside_a_section_is_deepspeeds_default():
    found = settled(zero_optimization={"stage": 2, "reduce_bucket_size": "auto"})
    assert found.settings["zero_optimization"] == {"stage": 2}
    assert found.overruled == [
        "zero_optimization.reduce_bucket_size: 'auto' becomes DeepSpeed's own default"
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "must hold one JSON object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' is there twice"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path, text, told):
    file = tmp_path / "own.json"
    file.write_text(text)
    with pytest.raises(GMAIError, match=told):
        read(str(file), CONFIG)


def test_every_key_of_deepspeed_is_known():
    """Its names of top-level sections, as constants; others it takes from inside sections."""
    known = {*HONOURED, *CONFIG_DECIDES, *DROPPED, *REFUSED}
    names = (
        "TRAIN_BATCH_SIZE TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS OPTIMIZER SCHEDULER "
        "FP16 BFLOAT16 AMP GRADIENT_CLIPPING ZERO_ALLOW_UNTESTED_OPTIMIZER ZERO_FORCE_DS_CPU_OPTIMIZER "
        "SPARSE_GRADIENTS STEPS_PER_PRINT PRESCALE_GRADIENTS GRADIENT_PREDIVIDE_FACTOR DISABLE_ALLGATHER "
        "DUMP_STATE MEMORY_BREAKDOWN WALL_CLOCK_BREAKDOWN EIGENVALUE PROGRESSIVE_LAYER_DROP CHECKPOINT "
        "DATA_TYPES DATALOADER_DROP_LAST COMMUNICATION_DATA_TYPE SPARSE_ATTENTION GRAPH_HARVESTING "
        "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE USE_DATA_BEFORE_EXPERT_PARALLEL"
    )
    assert {getattr(constants, name) for name in names.split()} <= known

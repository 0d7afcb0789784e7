# SPDX-License-Identifier: Apache-2.0

"""``import gmai_xtuner.plugin`` registers, and changes nothing else."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, random, sys
import numpy, torch, PIL.Image, PIL.ImageFile
state = lambda: (
    dict(os.environ), random.getstate(), numpy.random.get_state()[1].tolist(),
    torch.random.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
    PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
)
import xtuner.tools.train, deepspeed  # what xtuner itself changes is not ours
before = state()
import gmai_xtuner.plugin
assert state() == before, "importing changed the environment, a seed or a switch"

from mmengine.registry import DATASETS, DATA_SAMPLERS, FUNCTIONS, HOOKS, LOOPS, MODELS, PARAM_SCHEDULERS
from xtuner.registry import BUILDER, MAP_FUNC
for registry, names in (
    (BUILDER, ("GMAILLaVAModel", "SoftPackedDataset")),
    (MODELS, ("GMAILLaVAModel",)),
    (DATASETS, ("SoftPackedDataset",)),
    (MAP_FUNC, ("soft_packing_map_fn",)),
    (DATA_SAMPLERS, ("PackSampler", "MicroBatchSampler")),
    (FUNCTIONS, ("collate_packs",)),
    (LOOPS, ("PackedTrainLoop",)),
    (HOOKS, ("ProgressHook", "StepCheckpointHook", "OptimizerStepScheduleHook")),
    (PARAM_SCHEDULERS, ("WarmupCosineLR",)),
):
    for name in names:
        assert registry.get(name).__name__ == name, (registry, name)

import logging
from mmengine.logging import MMLogger
log = logging.getLogger("gmai_xtuner.core.files")
log.info("before a run")
MMLogger.get_instance("run", logger_name="run", log_file=sys.argv[1])
import importlib
importlib.reload(gmai_xtuner.plugin)  # a second import must not fail on names that are taken
log.info("Waiting for %s", "a lock")
print("registered")
"""


def test_import_registers_sends_the_log_on_and_does_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "run.log")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("registered")
    assert "before a run" in done.stdout + done.stderr
    assert (tmp_path / "run.log").read_text().count("INFO - Waiting for a lock") == 1

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
import importlib
importlib.reload(gmai_xtuner.plugin)  # a second import must not fail on names that are taken
print("registered")
"""


def test_import_registers_and_does_nothing_else():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("registered")

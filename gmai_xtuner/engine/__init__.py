"""What runs around the model: the loop, the learning-rate schedule, what the log shows."""

from gmai_xtuner.engine.hooks import ProgressHook, StepCheckpointHook
from gmai_xtuner.engine.loop import PackedTrainLoop
from gmai_xtuner.engine.schedule import OptimizerStepScheduleHook, WarmupCosineLR

__all__ = [
    "OptimizerStepScheduleHook",
    "PackedTrainLoop",
    "ProgressHook",
    "StepCheckpointHook",
    "WarmupCosineLR",
]

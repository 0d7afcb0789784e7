"""What runs around the model: the loop, the learning-rate schedule, what the log shows."""

from gmai_xtuner.engine.benchmarks import BenchmarkLoop, BenchmarkQuestions, BenchmarkScore
from gmai_xtuner.engine.checkpointing import StepCheckpointHook
from gmai_xtuner.engine.hooks import ProgressHook
from gmai_xtuner.engine.loop import PackedTrainLoop
from gmai_xtuner.engine.nonfinite import NonFiniteHook
from gmai_xtuner.engine.sample_answer import SampleAnswerHook
from gmai_xtuner.engine.schedule import OptimizerStepScheduleHook, WarmupCosineLR
from gmai_xtuner.engine.validation import HeldOutLoop, HeldOutLoss

__all__ = [
    "BenchmarkLoop",
    "BenchmarkQuestions",
    "BenchmarkScore",
    "HeldOutLoop",
    "HeldOutLoss",
    "NonFiniteHook",
    "OptimizerStepScheduleHook",
    "PackedTrainLoop",
    "ProgressHook",
    "SampleAnswerHook",
    "StepCheckpointHook",
    "WarmupCosineLR",
]

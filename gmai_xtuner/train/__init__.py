"""What runs around the model: the loop, the learning-rate schedule, what the log shows."""

from gmai_xtuner.train.benchmarks import BenchmarkLoop, BenchmarkQuestions, BenchmarkScore
from gmai_xtuner.train.checkpointing import StepCheckpointHook
from gmai_xtuner.train.hooks import ProgressHook
from gmai_xtuner.train.loop import PackedTrainLoop
from gmai_xtuner.train.nonfinite import NonFiniteHook
from gmai_xtuner.train.sample_answer import SampleAnswerHook
from gmai_xtuner.train.schedule import OptimizerStepScheduleHook, WarmupCosineLR
from gmai_xtuner.train.validation import HeldOutLoop, HeldOutLoss

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

# SPDX-License-Identifier: Apache-2.0

"""Memory of one GPU over a step of training, counted while DeepSpeed's own engine runs it on fake tensors.

The engine that ``xtuner train`` would start (0.16.2, with the workarounds of
:mod:`gmai_xtuner.compat.deepspeed`) runs in a process of its own, as the first rank of a fake process group:
collectives do nothing. What it makes is counted by :class:`gmai_xtuner.preflight.activations.LiveMemory`: on
the GPU, and where it offloads, in host memory. After a step that only makes the optimiser's moments come the
first micro-batch of a step, if it has several, and its last. Not counted: kernels' own buffers, what NCCL
takes, and what a stream that lags behind keeps from being used again.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from xtuner.registry import BUILDER

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.preflight.activations import (
    GPU,
    LiveMemory,
    MicroBatch,
    fake_gpu,
    flat_batch,
    make_fake,
)
from gmai_xtuner.preflight.run_config import ZeroSettings

GIB = 2**30
ALLOWANCE = 2 * GIB
"""For what can't be counted: CUDA context, NCCL's and cuBLAS' buffers, what the allocator can't use."""
BYTES_IN_4_BIT = 0.5 + 4 / 64
"""NF4 with an fp32 scale for each 64 weights; double quantisation takes a little less."""


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the model.

    ``in_4_bit`` are those that a 4-bit base (QLoRA) keeps quantised.
    """

    total: int
    trainable: int
    in_4_bit: int


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build ``cfg.model`` on the meta device; only ``config.json`` files are read.

    ``pretrained_pth`` is left out (see :mod:`gmai_xtuner.preflight.checks`), and a quantised base is
    built as what it was before.
    """
    model = {key: value for key, value in config.items() if key != "pretrained_pth"}
    if "quantization_config" in model.get("llm", {}):
        model["llm"] = {k: v for k, v in model["llm"].items() if k != "quantization_config"}
    with init_empty_weights():
        return BUILDER.build(model)


def quantises_to_4_bit(config: Mapping[str, Any]) -> bool:
    """Return whether the config's language model is loaded in 4 bit."""
    quantisation = config.get("llm", {}).get("quantization_config") or {}
    return bool(quantisation.get("load_in_4bit", False))


def count_parameters(model: nn.Module, *, llm_in_4_bit: bool = False) -> dict[str, PartCount]:
    """Count the parameters of each part, which is a direct child of the model that has any.

    With ``llm_in_4_bit`` bitsandbytes quantises the linear layers of ``llm``, all but the head.
    """
    counts: dict[str, PartCount] = {}
    seen: set[int] = set()
    for name, part in model.named_children():
        quantised = _linear_weights(part) if llm_in_4_bit and name == "llm" else set()
        # Tied weights are one parameter, and belong to the part that comes first.
        own = {id(parameter): parameter for parameter in part.parameters()}
        parameters = [value for key, value in own.items() if key not in seen]
        seen |= own.keys()
        if not parameters:
            continue
        counts[name] = PartCount(
            total=sum(one.numel() for one in parameters),
            trainable=sum(one.numel() for one in parameters if one.requires_grad),
            in_4_bit=sum(one.numel() for one in parameters if id(one) in quantised),
        )
    return counts


def _linear_weights(llm: nn.Module) -> set[int]:
    return {
        id(module.weight)
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear)
        and "lora_" not in name
        and name.rpartition(".")[2] != "lm_head"
        and not module.weight.requires_grad
    }


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, and in host memory for it.

    Args:
        weights: of the whole model, or this GPU's share.
        optimizer: fp32 weights and moments.
        kept: from a forward to its backward pass.
        peaks: what the highest moment of each part of a step adds to weights and optimiser.
        host: in host memory, for each GPU.
    """

    weights: int
    optimizer: int
    kept: int
    peaks: dict[str, int]
    host: int

    @property
    def total(self) -> int:
        """At the highest moment."""
        return self.weights + self.optimizer + self.peaks[self.moment] + ALLOWANCE

    @property
    def moment(self) -> str:
        """When that is: ``forward pass``, ``backward pass`` or ``optimizer step``."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def in_gib(self) -> dict[str, float]:
        """Parts and ``total``, rounded to MiB."""
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            **{name.replace(" ", "_"): value for name, value in self.peaks.items()},
            "activations_kept": self.kept,
            "allowance": ALLOWANCE,
            "total": self.total,
            "host": self.host,
        }
        return {name: round(value / GIB, 3) for name, value in parts.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run.

    Args:
        model: its config.
        zero: the DeepSpeed file.
        batch: the fullest micro-batch.
        gpus: of all machines together.
        accumulation: micro-batches of the step.
        optimizer: the type's name.
        in_4_bit: weights that lie on the GPU in 4 bit.
    """

    model: Mapping[str, Any]
    zero: ZeroSettings
    batch: MicroBatch
    gpus: int
    accumulation: int
    optimizer: str
    in_4_bit: int = 0


class CannotCount(GMAIError):
    """The engine does not run on fake tensors."""


def count_memory(step: Step) -> Memory:
    """Count a step in a process of its own, for DeepSpeed changes the process that it runs in.

    Raises:
        CannotCount: the engine does not run; says why.
    """
    # On any machine the GPU is one that is not there.
    alone = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=pickle.dumps(step),
        capture_output=True,
        env={**os.environ, **alone},
        check=False,
    )
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().split("\n")
        why = lines[-1].removeprefix("[rank0]: ") or f"its process ended with {ended.returncode}"
        raise CannotCount(f"a step can't be counted, so that its memory is not known: {why}")
    return Memory(**STRICT_JSON.decode(ended.stdout.decode()))


_PROGRAM = f"""
import json, pickle, sys
from dataclasses import asdict
from gmai_xtuner.cli import only_the_report_on_stdout
with only_the_report_on_stdout() as stdout:
    import gmai_xtuner.plugin  # makes xtuner and torch work together
    from {__name__} import run_engine
    json.dump(asdict(run_engine(pickle.load(sys.stdin.buffer))), stdout)
"""


def run_engine(step: Step) -> Memory:
    """Count a step in this process, which is of no other use afterwards."""
    import deepspeed

    _join_fake_group(step.gpus)
    model: Any = build_on_meta(step.model)
    settings = step.zero.settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": min(step.accumulation, 2),
        "gradient_clipping": 1.0,
    }
    if step.zero.stage == 3:
        _recompute_as_under_zero3(model, settings)
    if step.model.get("liger"):
        from gmai_xtuner.model.liger import install_liger

        install_liger(model.llm)
    peaks: dict[str, int] = {}

    def run(part: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        memory.peak = memory.live
        result = work()
        peaks[part] = max(peaks.get(part, 0), memory.peak)
        return result

    with fake_gpu(), LiveMemory() as memory:
        make_fake(model, step.batch.dtype)
        model._apply = lambda *_, **__: model  # it has its type and its place
        data = flat_batch(model, step.batch)
        learns = [one for one in model.parameters() if one.requires_grad]
        optimizer = _optimizer(step, learns)
        engine, *_ = deepspeed.initialize(
            model=model.train(), model_parameters=learns, optimizer=optimizer, config=settings
        )
        for last in (True, *[False] * (step.accumulation > 1), True):
            engine.set_gradient_accumulation_boundary(last)
            before = memory.live
            loss = run("forward pass", lambda: engine(data)["loss"])
            kept = memory.live - before
            run("backward pass", partial(engine.backward, loss))
            del loss
            run("optimizer step", engine.step)
        weights = _bytes(getattr(one, "ds_tensor", one) for one in model.parameters())
        states = _bytes(t for key, own in optimizer.state.items() for t in (key, *own.values()))
    lasting = weights + states
    saved = int(step.in_4_bit * (2 - BYTES_IN_4_BIT))
    peaks = {part: peak - lasting for part, peak in peaks.items()}
    return Memory(weights - saved, states, kept, peaks, memory.host)


def _join_fake_group(gpus: int) -> None:
    import deepspeed
    from deepspeed.accelerator import cpu_accelerator, set_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class FakeGPU(cpu_accelerator.CPU_Accelerator):
        """Tells the GPU from the host."""

        def device_name(self, device_index: int | None = None) -> str:
            return str(GPU)

        def current_device_name(self) -> str:
            return str(GPU)

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device == GPU

    set_accelerator(FakeGPU())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    # Fake numbers of ranks that are not there can't be compared.
    for name in ("partitioned_param_coordinator", "partition_parameters"):
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        module.assert_ints_same_as_other_ranks = lambda *_: None  # type: ignore[attr-defined]


def _recompute_as_under_zero3(model: Any, settings: Mapping[str, Any]) -> None:
    # Told only now: a model that is built under ZeRO-3 would be partitioned while it has no tensors.
    from transformers.integrations import HfDeepSpeedConfig

    from gmai_xtuner.model.llava import recompute_first_layers, use_reentrant

    model.zero3 = HfDeepSpeedConfig(dict(settings))  # known as long as it lives
    if model.use_activation_checkpointing:
        layers = model.llm.model.recomputed_layers
        model.llm.gradient_checkpointing_enable({"use_reentrant": use_reentrant()})
        recompute_first_layers(model.llm.model, layers)


def _optimizer(step: Step, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser itself where torch has it, as it runs on a GPU; else one that keeps as much."""
    name = step.optimizer.rpartition(".")[2]
    own = getattr(torch.optim, name, None)
    if own in (torch.optim.AdamW, torch.optim.Adam):
        # What is on a GPU all at once; torch sees none here.
        return own(parameters, foreach=not step.zero.offloads("optimizer"))
    return _Keeps(parameters, {"bytes_each": moment_bytes(name)})


class _Keeps(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None and one not in self.state:
                    size = group["bytes_each"] * one.numel()
                    moments = torch.empty(size, dtype=torch.uint8, device=one.device)
                    self.state[one] = {"moments": moments}


def _bytes(tensors: Iterator[Any]) -> int:
    """Bytes of their storages on the GPU, each counted once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.device == GPU
    }
    return sum(storages.values())


def moment_bytes(optimizer: str) -> int:
    """What an optimiser of this name keeps for each weight, its fp32 copy not counted."""
    name = optimizer.rpartition(".")[2].lower()
    return 2 if "8bit" in name else 4 if "sgd" in name or "lion" in name else 8

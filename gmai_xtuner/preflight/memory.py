# SPDX-License-Identifier: Apache-2.0

"""Memory of one GPU by part: what DeepSpeed keeps there, and what a micro-batch adds. An estimate.

With ``W`` weights, ``t`` of them trainable, ``n`` GPUs, ``b`` = 2 bytes (bf16, fp16) and ``a`` bytes for a
value of the step's gradient (``grad_accum_dtype``; ``b`` without it)::

    ZeRO stage   weights   gradients            optimiser (fp32 weights and AdamW's two moments)
    0            b W       b t + 4 t            12 t
    1            b W       b t + b t/n (*)      12 t/n
    2            b W       b t/n + a t/n (**)   12 t/n
    3            b W/n     a t/n                12 t/n

(*) where ``a`` is larger than ``b``: b t + a t, for the sum is not shared.
(**) this micro-batch's, and, where a step has several, the sum so far.

Offloading moves the optimiser, and with ``offload_param`` the weights, to host memory, where the gradient in
fp32 that the optimiser reads lies as well, and beside it the sum of the micro-batches.

Three moments; the largest counts. In the backward pass there are activations. At its end, under ZeRO-2, the
micro-batch's gradients are there once more, as ``a``, before they are added to the sum
(``independent_gradient_partition_epilogue``). The optimiser's step needs 8 bytes (gradient in fp32, AdamW's
temporary) for each weight that it steps at a time.

Source: DeepSpeed 0.16.2, ``runtime/zero/stage_1_and_2.py``, ``stage3.py`` and ``bf16_optimizer.py``, with
:func:`gmai_xtuner.compat.deepspeed.accumulate_all_gradients_in_fp32`; Rajbhandari et al. 2020, arXiv
1910.02054, figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from xtuner.registry import BUILDER

from gmai_xtuner.preflight.activations import Activations
from gmai_xtuner.preflight.run_config import ZeroSettings

GIB = 2**30
ALLOWANCE = 2 * GIB
"""For what can't be counted: CUDA context, NCCL's and cuBLAS' buffers, what the allocator can't use."""
BYTES_IN_4_BIT = 0.5 + 4 / 64
"""NF4 with an fp32 scale for each 64 weights; double quantisation takes a little less."""


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the model.

    ``in_4_bit`` are those that a 4-bit base (QLoRA) keeps quantised, ``own_bytes`` what all take in the types
    that the config gives them, ``largest_trainable`` the elements of the largest trainable tensor.
    """

    total: int
    trainable: int
    in_4_bit: int
    own_bytes: int
    largest_trainable: int


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
        learns = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        counts[name] = PartCount(
            total=sum(one.numel() for one in parameters),
            trainable=sum(learns),
            in_4_bit=sum(one.numel() for one in parameters if id(one) in quantised),
            own_bytes=sum(one.nbytes for one in parameters),
            largest_trainable=max(learns, default=0),
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
        gradients: at the end of a backward pass: of the micro-batch, and the step's sum so far.
        optimizer: fp32 weights and moments.
        buffers: of DeepSpeed: buckets for gradients, gathered weights.
        summing: what is added in the place of ``activations`` while gradients are summed.
        step: what the optimiser's step needs in the place of activations and buckets.
        host: in host memory, for each GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: Activations
    summing: int
    step: int
    host: int

    @property
    def total(self) -> int:
        """At the largest of the three moments."""
        lasting = self.weights + self.gradients + self.optimizer + ALLOWANCE
        return lasting + max(self._moments.values())

    @property
    def moment(self) -> str:
        """When that is: ``optimiser step``, ``gradient sum``, or the moment of the activations."""
        return max(self._moments, key=lambda name: self._moments[name])

    @property
    def _moments(self) -> dict[str, int]:
        return {
            self.activations.moment: self.buffers + self.activations.total,
            "gradient sum": self.buffers + self.summing,
            "optimiser step": self.step,
        }

    def in_gib(self) -> dict[str, float]:
        """Parts and ``total``, rounded to MiB."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "deepspeed_buffers": self.buffers,
            "activations": self.activations.total,
            "gradient_sum": self.summing,
            "optimizer_step": self.step,
            "allowance": ALLOWANCE,
            "total": self.total,
            "host": self.host,
        }
        return {name: round(value / GIB, 3) for name, value in parts.items()}


def estimate_memory(
    counts: Mapping[str, PartCount],
    zero: ZeroSettings,
    *,
    gpus: int,
    accumulation: int,
    moment_bytes: int,
    activations: Activations,
) -> Memory:
    """Compute what the module says, for ``n`` ``gpus`` and a step of ``accumulation`` micro-batches.

    ``moment_bytes`` is what the optimiser keeps for each weight beside its fp32 copy; 8 for AdamW.
    """
    trainable = sum(part.trainable for part in counts.values())
    share, several = -(-trainable // gpus), accumulation > 1
    weights = sum(_weight_bytes(part, zero) for part in counts.values())
    states = (4 + moment_bytes) * (share if zero.stage else trainable)
    # fp32 gradients and AdamW's temporary; stage 3 steps a sub-group at a time.
    at_a_time = min(share, zero.zero.sub_group_size) if zero.stage == 3 else share
    step = 8 * (at_a_time if zero.stage else trainable)
    gradients, summing = _gradients(zero, trainable, share, several=several)
    if zero.stage == 2 and summing:
        step -= gradients  # they are gone by then, but for the sum, which becomes one of the two
    host = 0
    if zero.offloads("optimizer"):
        # The sum of the micro-batches is fp32 whatever the file says of stage 1 and 2.
        summed = zero.grad_accum_bytes if zero.stage == 3 else 4 * several
        host = states + (4 + summed) * share
        states, step = 0, 4 * at_a_time
        if zero.stage > 1:
            gradients = summing = 0
    if zero.stage == 3:
        weights = -(-weights // gpus)
        if zero.offloads("param"):
            host, weights = host + weights, 0
    buffers = _buffers(counts, zero, trainable)
    return Memory(weights, gradients, states, buffers, activations, summing, step, host)


def _gradients(zero: ZeroSettings, trainable: int, share: int, *, several: bool) -> tuple[int, int]:
    """Bytes on the GPU at the end of a backward pass, and what is added while they are summed."""
    a, b = zero.grad_accum_bytes, _value_bytes(zero)
    if zero.stage == 0:
        return (b + (4 if b < 4 else 0)) * trainable, 0
    if zero.stage == 1:
        return (b + a) * trainable if a > b else b * (trainable + share), 0
    if zero.stage == 3:
        return a * share, 0
    # Where no value changes its type, the sum is made of the gradients themselves.
    return (b + (a if several else 0)) * share, a * share if a > b else 0


def _value_bytes(zero: ZeroSettings) -> int:
    """``b``: the engine converts the whole model, frozen parts too."""
    return 4 if zero.precision == "fp32" else 2


def moment_bytes(optimizer: str) -> int:
    """What an optimiser of this name keeps for each weight, its fp32 copy not counted."""
    name = optimizer.rpartition(".")[2].lower()
    return 2 if "8bit" in name else 4 if "sgd" in name or "lion" in name else 8


def _weight_bytes(part: PartCount, zero: ZeroSettings) -> int:
    if zero.precision == "fp32":
        return part.own_bytes
    return int(2 * (part.total - part.in_4_bit) + BYTES_IN_4_BIT * part.in_4_bit)


def _buffers(counts: Mapping[str, PartCount], zero: ZeroSettings, trainable: int) -> int:
    """Buckets for gradients, the gradient that autograd is making, and gathered weights."""
    if not trainable or not zero.stage:
        return 0
    b, buckets, bucket = _value_bytes(zero), 0, zero.zero.reduce_bucket_size
    if zero.zero.contiguous_gradients:
        buckets = bucket * (2 if zero.zero.overlap_comm and zero.stage < 3 else 1)
    largest = max(part.largest_trainable for part in counts.values())
    copied = 0
    if zero.exchange_bytes != b:  # of what is reduced at a time, in the precision of the exchange
        copied = zero.exchange_bytes * min(trainable, max(bucket, largest))
    gathered = 0
    if zero.stage == 3:
        live = zero.zero.max_live_parameters + zero.zero.prefetch_bucket_size
        gathered = min(sum(part.total for part in counts.values()), live)
    return b * (buckets + largest + gathered) + copied

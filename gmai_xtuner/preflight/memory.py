"""Memory of one GPU by part: what DeepSpeed keeps there, and what a micro-batch adds. An estimate.

With ``W`` weights, ``t`` of them trainable, ``n`` GPUs and ``b`` = 2 bytes (bf16, fp16)::

    ZeRO stage   weights   gradients            optimiser (fp32 weights and AdamW's two moments)
    0            b W       b t + 4 t            12 t
    1            b W       b t + b t/n          12 t/n
    2            b W       b t/n, twice (*)     12 t/n
    3            b W/n     b t/n                12 t/n

(*) where a step has several micro-batches: the sum so far, and this micro-batch's.

Offloading moves the optimiser, and with ``offload_param`` the weights, to host memory. While the optimiser
steps, no activation is alive; it needs 8 bytes (gradient in fp32, AdamW's temporary) for each weight that
it steps at a time. The larger of the two moments counts.

Source: DeepSpeed 0.16.2, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``; Rajbhandari et al. 2020,
arXiv 1910.02054, figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gmai_xtuner.preflight.activations import Activations
from gmai_xtuner.preflight.parameters import PartCount
from gmai_xtuner.preflight.run_config import ZeroSettings

GIB = 2**30
ALLOWANCE = 2 * GIB
"""For what can't be counted: CUDA context, NCCL's and cuBLAS' buffers, what the allocator can't use."""
BYTES_IN_4_BIT = 0.5 + 4 / 64
"""NF4 with an fp32 scale for each 64 weights; double quantisation takes a little less."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, and in host memory for it.

    Args:
        weights: of the whole model, or this GPU's share.
        gradients: that stay from micro-batch to micro-batch.
        optimizer: fp32 weights and moments.
        buffers: of DeepSpeed: buckets for gradients, gathered weights.
        activations: see :mod:`gmai_xtuner.preflight.activations`; ``None`` if they can't be estimated.
        step: what the optimiser's step needs in the place of activations and buckets.
        allowance: :data:`ALLOWANCE`.
        host: in host memory, for each GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: Activations | None
    step: int
    allowance: int
    host: int

    @property
    def total(self) -> int:
        """At the larger of the two moments."""
        passing = self.buffers + (self.activations.total if self.activations else 0)
        lasting = self.weights + self.gradients + self.optimizer + self.allowance
        return lasting + max(passing, self.step)

    @property
    def moment(self) -> str:
        """When that is: ``optimiser step``, or the moment of the activations."""
        passing = self.buffers + (self.activations.total if self.activations else 0)
        if self.step > passing or self.activations is None:
            return "optimiser step"
        return self.activations.moment

    def in_gib(self) -> dict[str, float]:
        """Parts and ``total``, rounded to MiB."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "deepspeed_buffers": self.buffers,
            "activations": self.activations.total if self.activations else 0,
            "optimizer_step": self.step,
            "allowance": self.allowance,
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
    activations: Activations | None,
) -> Memory:
    """See the module.

    Args:
        counts: parameters by part.
        zero: the DeepSpeed file.
        gpus: ``n``.
        accumulation: micro-batches of a step.
        moment_bytes: what the optimiser keeps for each weight beside its fp32 copy; 8 for AdamW.
        activations: of one micro-batch.
    """
    trainable = sum(part.trainable for part in counts.values())
    share = _shard(trainable, gpus)
    b = value_bytes(zero)
    weights = sum(_weight_bytes(part, zero) for part in counts.values())
    states = (4 + moment_bytes) * (share if zero.stage else trainable)
    # fp32 gradients and AdamW's temporary; stage 3 steps a sub-group at a time.
    at_a_time = min(share, zero.sub_group_size) if zero.stage == 3 else share
    step = 8 * (at_a_time if zero.stage else trainable)
    host = 0
    if zero.offload_optimizer:
        host += states + 4 * share
        states, step = 0, 4 * at_a_time
    if zero.stage == 3:
        weights = _shard(weights, gpus)
        if zero.offload_param:
            host, weights = host + weights, 0
    gradients = {
        0: (b + (4 if b < 4 else 0)) * trainable,
        1: b * (trainable + share),
        2: b * share * (2 if accumulation > 1 else 1),
        3: b * share,
    }[zero.stage]
    if zero.offload_optimizer and zero.stage > 1:
        gradients = 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        buffers=_buffers(counts, zero, trainable, b),
        activations=activations,
        step=step,
        allowance=ALLOWANCE,
        host=host,
    )


def value_bytes(zero: ZeroSettings) -> int:
    """``b``: the engine converts the whole model, frozen parts too."""
    return 4 if zero.precision == "fp32" else 2


def moment_bytes(optimizer: str) -> int:
    """What an optimiser of this name keeps for each weight, its fp32 copy not counted."""
    name = optimizer.rpartition(".")[2].lower()
    if "8bit" in name:
        return 2
    if "sgd" in name or "lion" in name:
        return 4
    return 8


def _weight_bytes(part: PartCount, zero: ZeroSettings) -> int:
    if zero.precision == "fp32":
        return part.own_bytes
    return int(2 * (part.total - part.in_4_bit) + BYTES_IN_4_BIT * part.in_4_bit)


def _shard(amount: int, gpus: int) -> int:
    return -(-amount // gpus)


def _buffers(counts: Mapping[str, PartCount], zero: ZeroSettings, trainable: int, b: int) -> int:
    """Buckets for gradients, the gradient that autograd is making, and gathered weights."""
    if not trainable or not zero.stage:
        return 0
    buckets = 0
    if zero.contiguous_gradients:
        buckets = zero.reduce_bucket_size * (2 if zero.overlap_comm and zero.stage < 3 else 1)
    largest = max(part.largest_trainable for part in counts.values())
    gathered = 0
    if zero.stage == 3:
        everything = sum(part.total for part in counts.values())
        gathered = min(everything, zero.max_live_parameters + zero.prefetch_bucket_size)
    return b * (buckets + largest + gathered)

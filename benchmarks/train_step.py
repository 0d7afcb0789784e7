# SPDX-License-Identifier: Apache-2.0

"""Useful tokens a second and MFU of whole training steps, packed, against xtuner's ``LLaVAModel``, padded.

    python benchmarks/train_step.py --geometry tiny --stage 3 --json            # CPU
    python benchmarks/train_step.py --geometry 7b --stage 1 --compare none --json     # one 80 GB GPU

Both sides train the same conversations from the same random weights, in the same precision, with
activation checkpointing, gradient clipping and AdamW (with fp32 master weights under bf16): forward,
backward and optimiser step, the copy of the batch to the device included. A useful token is one of a
conversation (image tokens count, padding does not); tokens a second are all of them over all of the time.

Ours: the package's packing and collate function, ``--micro-batch`` packs a step. xtuner's: its collate
function, batches of as many conversations as our mean step has, in random order (its LLaVA pretraining
config) or grouped by length (``LengthGroupedSampler``, its fine-tuning config), an image of zeros for a
conversation without one, as its ``LLaVADataset`` gives.

MFU: see :mod:`gmai_xtuner.model.costs`; the same model's work for the same conversations over each side's
time. Stage 3 of the 7B geometry runs forward and backward only: the optimiser's state fits no single
card.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# First, since importing DeepSpeed otherwise logs to standard output.
import gmai_xtuner.plugin  # noqa: F401

# isort: split
import numpy as np
import torch
from printing import quiet_stdout, show
from random_batches import (
    IMAGE_SIZE,
    Conversation,
    draw_conversations,
    fill_packs,
    our_batches,
    xtuner_batches,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import LLaVAModel

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.model.costs import ModelFlops, peak_flops
from gmai_xtuner.model.llava import recompute_first_layers

MICRO_BATCHES = {1: 8, 2: 4, 3: 4}
"""Packs of a micro-batch by stage (Table 8)."""
WARM_UP = 2
Batch = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model. Heads are 64 (tiny) or 128 wide, four query heads share a key in tiny and 7b."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    vision: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
    )


GEOMETRIES = {
    # The proportions of the 7B: a head of 5 % and a tower of about 5 % of a step's work, 3.5 x wide
    # feed-forward layers, four query heads to a key head, 576 tokens an image.
    "tiny": Geometry(
        *(256, 896, 8, 4, 1, 1472),
        vision={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 1,
        },
    ),
    "1b": Geometry(2048, 8192, 24, 16, 8, 92544),  # InternLM2.5-1.8B
    "7b": Geometry(4096, 14336, 32, 32, 8, 92544),  # InternLM2.5-7B
}


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    conversations: Sequence[Conversation]
    optimise: bool


def build_parts(
    geometry: Geometry, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Any, Any]:
    """Language model and tower with random weights, made on the device in their dtype."""
    torch.manual_seed(seed)
    llm = LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.key_heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    tower = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=14, **geometry.vision)
    with device:
        return (
            LlamaForCausalLM._from_config(llm, torch_dtype=dtype),
            CLIPVisionModel._from_config(tower, torch_dtype=dtype),
        )


class MasterAdamW:
    """AdamW, clipped to norm 1; under bf16 on fp32 copies of the weights, as ZeRO keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        self.optimiser = torch.optim.AdamW(
            self.masters, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0
        )

    @torch.no_grad()
    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        self.optimiser.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
            master.grad = None


class Side:
    """A model that trains batches, and the clock beside it."""

    def __init__(self, model: nn.Module, *, optimise: bool) -> None:
        self.model = model.train()
        self.optimiser = MasterAdamW(model) if optimise else None

    def loss(self, batch: Batch, device: torch.device) -> torch.Tensor:
        data = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch["data"].items()
        }
        return self.model(data)["loss"]

    def step(self, batch: Batch, device: torch.device) -> None:
        self.loss(batch, device).backward()
        if self.optimiser is None:
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimiser.step()

    def measure(self, batches: Iterable[Batch], device: torch.device) -> list[float]:
        """Seconds of each step after the warm-up."""
        seconds = []
        for index, batch in enumerate(batches):
            if index == WARM_UP:
                reset_peak_memory(device)
            batch = pinned(batch) if device.type == "cuda" else batch
            synchronize(device)
            started = time.perf_counter()
            self.step(batch, device)
            synchronize(device)
            if index >= WARM_UP:
                seconds.append(time.perf_counter() - started)
        return seconds


def pinned(batch: Batch) -> Batch:
    return {
        "data": {
            key: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for key, value in batch["data"].items()
        }
    }


def with_warm_up(batches: Sequence[Any]) -> list[Any]:
    return [batches[index % len(batches)] for index in range(WARM_UP)] + list(batches)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # no Linux, or forbidden: then the peak is that of the whole process


def peak_memory_gib(device: torch.device) -> float | None:
    """CUDA: allocated by torch. CPU: resident set of the process, where /proc tells it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) / 2**20
    except (OSError, KeyError):
        return None


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def build_ours(options: argparse.Namespace, setting: Setting) -> GMAILLaVAModel:
    llm, tower = build_parts(setting.geometry, setting.device, setting.dtype, options.seed)
    torch.manual_seed(options.seed + 1)  # the projector's weights
    model = GMAILLaVAModel(
        llm,
        tower,
        freeze_llm=options.stage < 3,
        freeze_visual_encoder=options.stage < 2,
        liger=options.liger,
    )
    model.projector.to(setting.device, setting.dtype)
    return model


def build_xtuner(options: argparse.Namespace, setting: Setting) -> LLaVAModel:
    llm, tower = build_parts(setting.geometry, setting.device, setting.dtype, options.seed)
    torch.manual_seed(options.seed + 1)
    return LLaVAModel(
        llm, tower, freeze_llm=options.stage < 3, freeze_visual_encoder=options.stage < 2
    ).to(setting.device)


def set_recomputed_layers(model: GMAILLaVAModel, layers: int) -> None:
    model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    recompute_first_layers(model.llm.model, layers)


def fewest_recomputed_layers(side: Side, batch: Batch, device: torch.device) -> int:
    """As few as leave a tenth of the device's memory free, found by trying.

    Memory grows by the same for every layer that keeps its activations: two trials give the slope.
    """
    total = len(side.model.llm.model.layers)

    def peak(kept: int) -> int | None:
        set_recomputed_layers(side.model, total - kept)
        free(device)
        torch.cuda.reset_peak_memory_stats()
        try:
            side.step(batch, device)
        except torch.cuda.OutOfMemoryError:
            side.model.zero_grad(set_to_none=True)
            return None
        return torch.cuda.max_memory_allocated()

    limit = int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    peak(0)  # makes the optimiser's state
    few, more = peak(2), peak(6)
    if few is None or more is None:
        return total
    kept = min(total, max(0, 2 + int((limit - few) / max(1, (more - few) / 4))))
    while kept > 0:
        used = peak(kept)
        if used is not None and used <= limit:
            break
        kept -= 1
    return total - kept


def token_mean(
    side: Side, conversations: Sequence[Conversation], device: torch.device, *, packed: bool
) -> float:
    """Loss of the first conversations, to see that both sides compute the same."""
    few = list(conversations[:3])
    if packed:
        (batch,) = our_batches(few, [np.arange(len(few))], 1, max_length=2048)
    else:
        batch = default_collate_fn(xtuner_batches(few, len(few), "shuffled")[0].instances)
    with torch.no_grad():
        return float(side.loss(batch, device))


def measure_ours(
    options: argparse.Namespace, setting: Setting, batches: list[Batch]
) -> dict[str, Any]:
    model = build_ours(options, setting)
    flops = ModelFlops.of(model)
    side = Side(model, optimise=setting.optimise)
    loss = token_mean(side, setting.conversations, setting.device, packed=True)
    layers = len(model.llm.model.layers)
    recomputed = layers if options.recomputed_layers is None else options.recomputed_layers
    if options.recomputed_layers is None and setting.device.type == "cuda":
        largest = max(batches, key=lambda batch: batch["data"]["num_tokens"])
        recomputed = fewest_recomputed_layers(side, largest, setting.device)
    set_recomputed_layers(model, recomputed)
    seconds = side.measure(with_warm_up(batches), setting.device)
    work = sum(
        flops.flops(
            data["lengths"],
            learnt_tokens=len(data["label_targets"]),
            images=data["pixel_values"].shape[0],
        )
        for data in (batch["data"] for batch in batches)
    )
    return {
        "loss": loss,
        "seconds": sum(seconds),
        "seconds_per_step": statistics.median(seconds),
        "flops": work,
        "recomputed_layers": recomputed,
        "peak_memory_gib": peak_memory_gib(setting.device),
    }


def measure_xtuner(
    options: argparse.Namespace, setting: Setting, size: int, order: str
) -> dict[str, Any]:
    """Halves the batch until it fits the device."""
    side: Side | None = None
    while size:
        batches = xtuner_batches(setting.conversations, size, order)
        try:
            side = Side(build_xtuner(options, setting), optimise=setting.optimise)
            loss = token_mean(side, setting.conversations, setting.device, packed=False)
            collated = (default_collate_fn(batch.instances) for batch in with_warm_up(batches))
            seconds = side.measure(collated, setting.device)
        except torch.cuda.OutOfMemoryError:
            size //= 2
            continue
        finally:
            side = None
            free(setting.device)
        tokens = sum(batch.tokens for batch in batches)
        return {
            "loss": loss,
            "batch": size,
            "seconds": sum(seconds),
            "padding_share": 1 - tokens / sum(batch.padded_tokens for batch in batches),
            "peak_memory_gib": peak_memory_gib(setting.device),
        }
    raise SystemExit("xtuner's LLaVAModel does not fit this device with a single conversation")


def run(options: argparse.Namespace) -> dict[str, Any]:
    geometry = GEOMETRIES[options.geometry]
    if options.vocabulary:
        geometry = replace(geometry, vocabulary=options.vocabulary)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    micro_batch = options.micro_batch or MICRO_BATCHES[options.stage]
    packs_wanted = options.steps * micro_batch
    drawn = draw_conversations(
        packs_wanted * 8,
        vocabulary=geometry.vocabulary,
        max_length=options.max_length,
        seed=options.seed,
    )
    conversations, packs = fill_packs(drawn, packs_wanted, options.max_length)
    batches = our_batches(conversations, packs, micro_batch, options.max_length)
    optimise = not (options.geometry == "7b" and options.stage == 3)
    setting = Setting(geometry, device, dtype, conversations, optimise)

    ours = measure_ours(options, setting, batches)
    free(device)
    tokens = sum(conversation.length for conversation in conversations)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = (
        (peak_flops(name) if device.type == "cuda" else None) if dtype == torch.bfloat16 else None
    )

    def mfu(seconds: float) -> float | None:
        return None if peak is None else ours["flops"] / seconds / peak

    result = {
        "geometry": options.geometry,
        "stage": options.stage,
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary": geometry.vocabulary,
        "micro_batch": micro_batch,
        "steps": len(batches),
        "conversations": len(conversations),
        "tokens": tokens,
        "optimiser": "AdamW" if optimise else "none: its state fits no single card",
        "liger": options.liger,
        "recomputed_layers": ours["recomputed_layers"],
        "layers": geometry.layers,
        "useful_tokens_per_second": tokens / ours["seconds"],
        "mfu": mfu(ours["seconds"]),
        "model_tflops_per_second": ours["flops"] / ours["seconds"] / 1e12,
        "seconds_per_step": ours["seconds_per_step"],
        "peak_memory_gib": ours["peak_memory_gib"],
        "fill": tokens / (len(packs) * options.max_length),
        "loss": ours["loss"],
    }
    orders = {"none": [], "xtuner": ["shuffled", "grouped"]}[options.compare]
    if options.xtuner_order != "both":
        orders = [order for order in orders if order == options.xtuner_order]
    for order in orders:
        size = max(1, round(len(conversations) / len(batches)))
        theirs = measure_xtuner(options, setting, size, order)
        # Untrained, both near ln(vocabulary): what bf16 rounds is far less than what a lost image is.
        if abs(theirs["loss"] / ours["loss"] - 1) > (1e-4 if dtype == torch.float32 else 1e-2):
            raise SystemExit(
                f"the two sides compute different losses: {ours['loss']} and {theirs['loss']}"
            )
        prefix = "xtuner_" if order == orders[0] else "xtuner_grouped_"
        result |= {
            f"{prefix}order": order,
            f"{prefix}useful_tokens_per_second": tokens / theirs["seconds"],
            f"{prefix}mfu": mfu(theirs["seconds"]),
            f"{prefix}batch": theirs["batch"],
            f"{prefix}loss": theirs["loss"],
            f"{prefix}peak_memory_gib": theirs["peak_memory_gib"],
            "padding_share" if order == orders[0] else "grouped_padding_share": theirs[
                "padding_share"
            ],
            "ratio" if order == orders[0] else "ratio_grouped": theirs["seconds"] / ours["seconds"],
        }
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bf16 on CUDA")
    parser.add_argument("--micro-batch", type=int, help="packs; default: the paper's, 8, 4 or 4")
    parser.add_argument("--steps", type=int, default=5, help="micro-batches that are timed")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--compare", choices=("xtuner", "none"), default="xtuner")
    parser.add_argument(
        "--xtuner-order",
        choices=("both", "shuffled", "grouped"),
        default="both",
        help="order of xtuner's batches; with both, `ratio` is against the shuffled ones",
    )
    parser.add_argument("--vocabulary", type=int, help="instead of the geometry's")
    parser.add_argument("--liger", action="store_true", help="our side with Liger's kernels")
    parser.add_argument(
        "--recomputed-layers",
        type=int,
        help="of the language model, our side; default: all on the CPU, on CUDA as few as fit",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with quiet_stdout():
        result = run(options)
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0

"""What a model takes: parameters and memory of its parts, and the operations of a training step (MFU).

Shapes: ``T`` tokens of the flat batch, ``M`` supervised tokens, ``L`` tokens of one conversation, ``N``
images of ``P`` patch tokens, ``C`` width of the vision tower.

What is counted (one multiply-add is 2 FLOPs, as everywhere):

* matrix products alone, by the modules that the model really has: linear layers (adapters too), the patch
  convolution, and attention; the head only for the ``M`` tokens that learn;
* forward once; the gradient with respect to the input where one flows; the gradient with respect to the
  weight where the weight learns. All that learns: 6 FLOPs a weight and token ("6N"). A frozen
  language model that hands gradients on to the projector: 4. A frozen vision tower: 2;
* attention for each conversation by itself and causally: ``L (L + 1) / 2`` pairs of a query and a key, not
  ``L * L`` (PaLM counts the square, Chowdhery et al. 2022, appendix B, so our MFU is the lower one) and
  never across the conversations of a pack; the vision tower's attention is not causal;
* recomputation is *not* counted, nor is padding, nor the image of zeros of a micro-batch without images:
  this is the model's work (MFU), not the hardware's (HFU).

The input gradient of the very first linear layers above something frozen is left out only for the whole
part (the projector's first layer in stage 1), not for single layers: with LoRA in the tower the FLOPs of its
first layer are up to 1.5 times too many, which is below one part in 500 of a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import nn

_TERA = 1e12

#: Dense bf16 tensor-core peaks with fp32 accumulation (half of the data sheets' figure "with sparsity");
#: the first match counts, so variants stand before the plain name. From NVIDIA's data sheets: H100
#: (SXM 1,979, PCIe 1,513, NVL 1,671 TFLOPS sparse), H200 (SXM 1,979, NVL 1,671), A100 (312 dense),
#: H20 (148 dense), L40S (733 sparse), L40 (362 sparse), L4 (242 sparse), A40 (149.7 dense), A30 (165
#: dense), B200 and B300 (4,500 sparse), GB200 and GB300 (5,000 sparse), L20 (119.5 dense), A10 (125 dense),
#: A10G (70 dense, AWS), RTX A6000 (309.7 sparse), GeForce 3090 and 4090 (71 and 165.2 dense with fp32
#: accumulation; whitepapers of GA102 and AD102; their Ti, D and laptop variants differ).
#: H100 PCIe reports itself as "H100 PCIe" or "H100 80GB HBM2e".
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"H100 NVL|H200 NVL", 835 * _TERA),
    (r"H100.*(PCIe|HBM2e)|H800 PCIe", 756 * _TERA),
    (r"GH200|H100|H200|H800", 989 * _TERA),
    (r"A100|A800", 312 * _TERA),
    (r"H20", 148 * _TERA),
    (r"GB200|GB300", 2500 * _TERA),
    (r"B200|B300", 2250 * _TERA),
    (r"RTX A6000", 154.8 * _TERA),
    (r"RTX 4090(?! D| Laptop)", 165.2 * _TERA),
    (r"RTX 3090(?! Ti)", 71 * _TERA),
    (r"L20", 119.5 * _TERA),
    (r"A10G", 70 * _TERA),
    (r"A10", 125 * _TERA),
    (r"L40S", 366 * _TERA),
    (r"L40", 181 * _TERA),
    (r"L4", 121 * _TERA),
    (r"A40", 149.7 * _TERA),
    (r"A30", 165 * _TERA),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs a second of a device, by the name that CUDA gives it.

    ``None`` for a device that is not in the table and for a MIG slice, whose share is not in its name.
    """
    if " MIG " in device_name:
        return None
    known = (peak for pattern, peak in _PEAKS if re.search(rf"\b({pattern})\b", device_name))
    return next(known, None)


def device_peak_flops() -> float | None:
    """:func:`peak_flops` of the current CUDA device; ``None`` without one."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of the forward pass, of the gradients of inputs and of those of weights."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))

    def __mul__(self, times: int) -> Work:
        return Work(*(part * times for part in astuple(self)))

    @property
    def flops(self) -> int:
        return 2 * sum(astuple(self))


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Work of a model by what it grows with.

    Args:
        token: the language model's layers, for each token.
        learnt_token: the head, for each supervised token.
        pair: the language model's attention, for each pair of a query and a key.
        image: vision tower and projector, for each image.
    """

    token: Work
    learnt_token: Work
    pair: Work
    image: Work

    @classmethod
    def of(cls, model: Any) -> ModelFlops:
        """Of a ``GMAILLaVAModel`` as it is frozen now, be it on the meta device or partitioned by ZeRO-3."""
        llm, config = model.llm, model.llm.config
        head_width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        attention_width = config.num_attention_heads * head_width * config.num_hidden_layers
        # Whatever learns lies before the language model's layers or in them, and the projector
        # always learns, so a gradient flows through every layer.
        return cls(
            token=_linears(llm.model.layers, flows=True),
            learnt_token=_linear(llm.lm_head, flows=True),
            pair=_attention(attention_width, flows=True),
            image=_image(model),
        )

    def flops(
        self,
        lengths: Sequence[int],
        *,
        learnt_tokens: int,
        images: int,
        causal: bool = True,
    ) -> int:
        """FLOPs of a flat batch.

        Args:
            lengths: tokens of each conversation, image tokens counted.
            learnt_tokens: tokens that the loss is taken of.
            images: images of the batch.
            causal: count the pairs that a causal mask leaves; else all ``L * L``.
        """
        pairs = sum(length * (length + 1) // 2 if causal else length**2 for length in lengths)
        text = self.token * sum(lengths) + self.learnt_token * learnt_tokens
        return (text + self.pair * pairs + self.image * images).flops

    def of_batch(self, data: Mapping[str, Any]) -> int:
        """FLOPs of a collated micro-batch; none for one that only fills a place on its rank."""
        if not data["num_tokens"]:
            return 0
        return self.flops(
            data["lengths"],
            learnt_tokens=len(data["label_targets"]),
            images=len(data["pixel_values"]),
        )


def _linear(layer: nn.Linear, *, flows: bool) -> Work:
    size = layer.in_features * layer.out_features  # ZeRO-3 empties `weight.shape`
    return Work(size, size if flows else 0, size if layer.weight.requires_grad else 0)


def _linears(part: nn.Module, *, flows: bool) -> Work:
    layers = (module for module in part.modules() if isinstance(module, nn.Linear))
    return sum((_linear(layer, flows=flows) for layer in layers), Work())


def _attention(width: int, *, flows: bool) -> Work:
    """Of one pair: query times key and weight times value; both operands of both get a gradient."""
    products = 2 * width
    return Work(products, 2 * products if flows else 0, 0)


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _image(model: Any) -> Work:
    """Patch convolution, the layers up to the selected hidden state, and the projector."""
    config, vision = model.visual_encoder.config, model.visual_encoder.vision_model
    patches = (config.image_size // config.patch_size) ** 2
    tokens = vision.embeddings.num_positions  # with the class token, where there is one
    layers = vision.encoder.layers[: range(config.num_hidden_layers + 1)[model.visual_select_layer]]
    convolution = vision.embeddings.patch_embedding
    kernel = convolution.in_channels * config.patch_size**2 * convolution.out_channels
    work = Work(kernel, 0, kernel if convolution.weight.requires_grad else 0) * patches

    flows = _learns(vision.embeddings)  # or neither these nor CLIP's first norm
    for layer in layers:
        flows = flows or _learns(layer)
        work += _linears(layer, flows=flows) * tokens
        work += _attention(config.hidden_size, flows=flows) * tokens**2

    projector = [m for m in model.projector.modules() if isinstance(m, nn.Linear)]
    for linear in projector:
        work += _linear(linear, flows=flows) * patches
        flows = flows or linear.weight.requires_grad
    return work


# --- parameters and memory ---

LABELS = {"visual_encoder": "vision tower", "projector": "projector", "llm": "language model"}
"""Parts in the order in which an image passes them."""


@dataclass(frozen=True, slots=True)
class PartCost:
    """Parameters of a part, their dtypes, and bytes in memory; tied weights count once."""

    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def part_cost(part: nn.Module) -> PartCost:
    """Count a part, quantised weights by what they take."""
    weights = list(part.parameters())
    return PartCost(
        # A 4-bit weight holds two numbers in a byte.
        parameters=sum(_numbers(weight) for weight in weights),
        dtypes=tuple(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
        bytes=sum(weight.nbytes for weight in weights),
    )


def _numbers(weight: Any) -> int:
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(torch.Size(state.shape).numel())


def cache_bytes(config: Any, *, tokens: int, dtype: torch.dtype) -> int:
    """Memory of keys and values of a conversation of ``tokens``, image tokens counted.

    ``config`` and ``dtype`` are the language model's.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens
    return values * torch.empty(0, dtype=dtype).element_size()


def describe_parts(
    parts: Mapping[str, nn.Module], *, folder: Path | None = None, dtype: torch.dtype | None = None
) -> str:
    """Return a table: a line a part, their sum, and what the folder with them takes on disk.

    ``dtype`` is what they are written in, where that isn't theirs.
    """
    costs = {LABELS[name]: part_cost(parts[name]) for name in LABELS if name in parts}
    if dtype is not None:
        shown = (str(dtype).removeprefix("torch."),)
        costs = {
            name: PartCost(cost.parameters, shown, cost.parameters * dtype.itemsize)
            for name, cost in costs.items()
        }
    parameters = sum(cost.parameters for cost in costs.values())
    costs["all"] = PartCost(parameters, (), sum(cost.bytes for cost in costs.values()))
    lines = [f"{'':14}  {'parameters':>14}  {'dtype':<9}  {'memory':>10}"]
    lines += [
        f"{name:14}  {cost.parameters:>14,}  {'/'.join(cost.dtypes):<9}  {size(cost.bytes):>10}"
        for name, cost in costs.items()
    ]
    if folder is not None:
        lines.append(f"on disk: {size(folder_bytes(folder))} in {folder}")
    return "\n".join(line.rstrip() for line in lines)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size(number: float) -> str:
    """Return bytes for people: ``14.4 GiB``."""
    exponent = next((e for e in (0, 1, 2) if number < 1024 ** (e + 1)), 3)
    unit = ("B", "KiB", "MiB", "GiB")[exponent]
    return f"{number / 1024**exponent:.{min(exponent, 1)}f} {unit}"

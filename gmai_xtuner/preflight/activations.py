# SPDX-License-Identifier: Apache-2.0

"""How much memory the activations of one micro-batch take: an estimate, by counting tensors.

Letters: ``T`` tokens of a micro-batch, ``M`` learnt ones, ``N`` images of ``P`` patches (``S = P + 1`` with
the class token), ``D`` and ``I`` widths of the language model, ``C`` and ``J`` widths of the vision tower,
``V`` vocabulary, ``b`` bytes of a value (2 in bf16).

Kept from the forward to the backward pass, with activation checkpointing::

    language model   b T D       for each layer: its input
    projector        b N P (C + 2 D)
    vision tower     b N S C     for each layer, and for the norm before the first; only if it learns

On top of that comes the largest of these moments::

    loss             logits of a chunk of c tokens: (b + 8) c V; 4 T D for the last norm, which computes in
                     fp32; with a head that learns 4 V D for its gradient, and (4 + b) V D while that is
                     scaled and rounded
    decoder layer    one layer recomputed: T (5 D + 6 I) b, + 8 T D for its norms, + 5 T D b if its matrices
                     (or adapters beside them) learn
                     LoRA with dropout: + T (6 D + I) (b + 1)
    vision layer     one layer recomputed: N S (8 C + 5 J) b; N S (4 C + 3 J) b where it only runs forward

The counts were read from the code (transformers 4.48) and are held against the peak that the model itself
reaches, in ``tests/preflight/test_activations.py``. Buffers inside kernels, and what the allocator can't
use, are not in them. Liger's kernels take less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gmai_xtuner.preflight.geometry import Geometry, LanguageGeometry, VisionGeometry


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one GPU takes at a time.

    Args:
        tokens: ``T``.
        learnt: ``M``.
        images: ``N``.
        value_bytes: ``b``.
    """

    tokens: int
    learnt: int
    images: int
    value_bytes: int


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes at the highest moment.

    Args:
        language_kept: of the language model, kept until its backward pass.
        vision_kept: of the vision tower and the projector, and the pixels.
        peak: what the moment adds.
        moment: ``loss``, ``decoder layer`` or ``vision layer``.
    """

    language_kept: int
    vision_kept: int
    peak: int
    moment: str

    @property
    def total(self) -> int:
        return self.language_kept + self.vision_kept + self.peak


def estimate_activations(geometry: Geometry, batch: MicroBatch) -> Activations:
    """See the module."""
    language = _layers_kept(geometry, batch)
    pixels, tower, projector = (
        _pixels(geometry, batch),
        _tower(geometry, batch),
        _projector(geometry, batch),
    )
    vision = pixels + tower + projector
    moments = {
        # name: (kept of the language model, kept of the rest, on top of it)
        "loss": (language, vision, _loss(geometry, batch)),
        "decoder layer": (language, vision, _gradients_of_layer(geometry, batch)),
        "vision layer": (0, pixels + tower, _vision_layer(geometry, batch)),
    }
    if geometry.recomputed_layers:
        # The layers that are kept whole come last, and are free when the first is recomputed.
        inputs = _layers_kept(replace(geometry, kept_layers=0), batch)
        moments["decoder layer"] = max(
            moments["decoder layer"], (inputs, vision, _recomputed_layer(geometry, batch)), key=sum
        )
    moment = max(moments, key=lambda name: sum(moments[name]))
    language, vision, peak = moments[moment]
    return Activations(language, vision, peak, moment)


def _layers_kept(geometry: Geometry, batch: MicroBatch) -> int:
    """What the decoder layers keep, and the rotary angles."""
    sizes, b = geometry.language, batch.value_bytes
    inputs = geometry.recomputed_layers * b * sizes.hidden
    whole = geometry.kept_layers * _decoder_layer_saved(sizes, b)
    return batch.tokens * (inputs + whole + 2 * b * sizes.head)


def _decoder_layer_saved(sizes: LanguageGeometry, b: int) -> int:
    """Bytes a token that one decoder layer saves for its backward pass."""
    wide = sizes.heads * sizes.head
    # A norm keeps an fp32 copy; in fp32 the tensor itself, which for the first is the layer's input.
    norms = 2 * 4 * sizes.hidden if b < 4 else 4 * sizes.hidden
    attention = (
        4 * wide * b + 4 * sizes.heads
    )  # queries, repeated keys and values, output, log-sums
    saved = norms + attention + 3 * sizes.intermediate * b
    if sizes.base_learns or sizes.adapters_learn:
        # Inputs of the matrices and of the norms' weights.
        saved += 5 * sizes.hidden * b + sizes.intermediate * b
    if sizes.adapter_dropout:
        # Each matrix has a copy of its input, and a mask of bytes.
        saved += (6 * sizes.hidden + sizes.intermediate) * (b + 1)
    return saved


def _gradients_of_layer(geometry: Geometry, batch: MicroBatch) -> int:
    """While the gated product of a layer is differentiated."""
    sizes = geometry.language
    return batch.tokens * (sizes.hidden + 3 * sizes.intermediate) * batch.value_bytes


def _recomputed_layer(geometry: Geometry, batch: MicroBatch) -> int:
    sizes, b = geometry.language, batch.value_bytes
    saved = _decoder_layer_saved(sizes, b)
    if sizes.base_learns or sizes.adapters_learn:
        saved -= sizes.intermediate * b  # the input of the layer's last matrix is free by then
    return batch.tokens * saved + _gradients_of_layer(geometry, batch)


def _loss(geometry: Geometry, batch: MicroBatch) -> int:
    """Logits of a chunk in ``b`` and in fp32 and their softmax in fp32, below all hidden states."""
    sizes, b = geometry.language, batch.value_bytes
    logits = min(geometry.loss_chunk_size, batch.learnt) * sizes.vocabulary
    softmax = logits * (8 + (b if b < 4 else 0))
    last_norm = batch.tokens * sizes.hidden * (4 + (b if sizes.head_learns else 0))
    # All hidden states, those of learnt tokens, and their gradients.
    above = last_norm + (batch.tokens + 2 * batch.learnt) * sizes.hidden * b
    if not sizes.head_learns:
        return above + softmax
    head = sizes.vocabulary * sizes.hidden
    # Its gradient is summed in fp32, then scaled (a copy) and rounded (another).
    return above + 4 * head + max(softmax, logits * b + head * b, head * (4 + b))


def _pixels(geometry: Geometry, batch: MicroBatch) -> int:
    """What the collate function hands over, fp32, and what the first layer keeps of it to learn from."""
    pixels = 3 * geometry.vision.image_size**2 * _images(batch)
    copied = geometry.vision.learns and batch.value_bytes < 4
    return pixels * (4 + (batch.value_bytes if copied else 0))


def _images(batch: MicroBatch) -> int:
    return max(batch.images, 1)  # a micro-batch without images runs one that is blank


def _projector(geometry: Geometry, batch: MicroBatch) -> int:
    """Inputs of its linear layers and of the GELUs between them."""
    width = geometry.vision.hidden + 2 * geometry.language.hidden * (geometry.projector_depth - 1)
    return _images(batch) * geometry.vision.patches * width * batch.value_bytes


def _tower(geometry: Geometry, batch: MicroBatch) -> int:
    sizes, b = geometry.vision, batch.value_bytes
    if not sizes.learns:
        return 0
    each = sizes.hidden * b if geometry.checkpointing else _vision_layer_saved(sizes, b)
    return _images(batch) * (sizes.patches + 1) * (sizes.layers * each + sizes.hidden * b)


def _vision_layer_saved(sizes: VisionGeometry, b: int) -> int:
    """Bytes a token: norms' inputs and outputs, attention, feed-forward."""
    saved = (8 * sizes.hidden + 3 * sizes.intermediate) * b + 4 * sizes.heads
    return saved + _dropped(sizes, b)


def _dropped(sizes: VisionGeometry, b: int) -> int:
    return (5 * sizes.hidden + sizes.intermediate) * (b + 1) if sizes.adapter_dropout else 0


def _vision_layer(geometry: Geometry, batch: MicroBatch) -> int:
    sizes, b = geometry.vision, batch.value_bytes
    if not sizes.learns:
        each = (4 * sizes.hidden + 3 * sizes.intermediate) * b
    elif geometry.checkpointing:
        each = (8 * sizes.hidden + 5 * sizes.intermediate) * b + _dropped(sizes, b)
    else:
        each = (sizes.hidden + 2 * sizes.intermediate) * b
    return _images(batch) * (sizes.patches + 1) * each

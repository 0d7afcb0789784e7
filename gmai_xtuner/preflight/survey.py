# SPDX-License-Identifier: Apache-2.0

"""The whole preflight: everything that is looked at, in order, in one object."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import nn

from gmai_xtuner.model.costs import ModelFlops
from gmai_xtuner.model.llava import num_image_tokens
from gmai_xtuner.preflight import checks, data, pictures
from gmai_xtuner.preflight.activations import MicroBatch
from gmai_xtuner.preflight.memory import (
    GIB,
    CannotCount,
    Memory,
    PartCount,
    Step,
    build_on_meta,
    count_memory,
    count_parameters,
    quantises_to_4_bit,
)
from gmai_xtuner.preflight.pictures import BadImage
from gmai_xtuner.preflight.run_config import Findings, RunConfig, ZeroSettings
from gmai_xtuner.train.settings import read

ALTERNATIVES = ("zero2", "zero3", "zero2_offload", "zero3_offload")
"""DeepSpeed files that are tried where the memory does not suffice."""
SPARE = 0.05
"""Share of a GPU's memory that is left free where fewer layers are recomputed: not all can be counted."""
SKIP = "--cfg-options train_dataloader.dataset.on_bad_sample=skip"
"""Leaves bad records out of the training."""


@dataclass(slots=True)
class Preflight:
    """What was found. ``None`` where something could not be found out.

    Args:
        run, findings: the run, what makes it fail, and what else to know about it.
        gpu_memory: of one GPU, GiB.
        throughput: useful tokens a second on one GPU.
        counts: parameters by part.
        summary, survey: the data plan in numbers; datasets that are missing or have bad records.
        bad_images: images that are missing or, if all were decoded, bad.
        decoded: images that were decoded; 0 if that was not asked for.
        memory, disk: of one GPU; checkpoints and free space.
    """

    run: RunConfig
    gpu_memory: float
    throughput: float | None
    findings: Findings = field(default_factory=Findings)
    counts: dict[str, PartCount] | None = None
    summary: data.DataSummary | None = None
    survey: data.Survey = field(default_factory=data.Survey)
    bad_images: list[BadImage] = field(default_factory=list)
    decoded: int = 0
    memory: Memory | None = None
    disk: dict[str, Any] | None = None

    @property
    def hours(self) -> float | None:
        """Hours of the whole run, at the throughput."""
        if self.summary is None or not self.throughput:
            return None
        return self.summary.tokens * self.summary.epochs / (self.throughput * self.run.gpus) / 3600

    def missing_images(self) -> Iterator[tuple[str, str]]:
        """Yield dataset and path of each image that is not there, also of those in the lists on disk."""
        noted = (
            (bad.name, image, reason)
            for bad in self.survey.bad.values()
            for note in bad.notes()
            for image, reason in note.get("images", {}).items()
        )
        found = ((image.dataset, image.image, image.reason) for image in self.bad_images)
        every = chain(found, noted)
        return iter(dict.fromkeys((a, b) for a, b, reason in every if reason == "missing_image"))


def look_at(
    run: RunConfig,
    *,
    gpu_memory: float = 80.0,
    throughput: float | None = None,
    decode_images: bool = False,
    need_weights: bool = True,
) -> Preflight:
    """Look at everything; without ``need_weights`` neither at base weights nor at the stage before."""
    result = Preflight(run, gpu_memory, throughput)
    findings = result.findings
    checks.check_options(run, findings)
    model = _look_at_model(result)
    if model is not None and need_weights:
        checks.check_base_weights(run, model, findings)
        checks.check_stage_before(run, model, findings)
    _look_at_data(result, decode_images)
    if model is not None and result.counts is not None:
        try:
            _look_at_memory(result, model)
        except CannotCount as error:
            findings.warn("memory", str(error))
        steps = result.summary.steps if result.summary else None
        result.disk = checks.check_disk(
            run, result.counts, steps, findings, elsewhere=not need_weights
        )
    return result


def _look_at_model(result: Preflight) -> nn.Module | None:
    config = result.run.cfg.model
    try:
        model = build_on_meta(config)
    # mmengine passes on whatever a builder raises, with the name of the class.
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        result.findings.fail("model", str(error))
        return None
    in_4_bit = quantises_to_4_bit(config)
    result.counts = count_parameters(model, llm_in_4_bit=in_4_bit)
    if not sum(part.trainable for part in result.counts.values()):
        result.findings.fail("model", "nothing is trainable: everything is frozen")
        return None
    if in_4_bit and result.run.zero.stage == 3:
        problem = "ZeRO-3 can't partition 4-bit weights. Take zero1 or zero2"
        result.findings.fail("deepspeed", problem)
        return None
    return model


def _look_at_data(result: Preflight, decode_images: bool) -> None:
    run, findings = result.run, result.findings
    dataset, survey = data.plan_data(run, findings)
    result.survey = survey
    if survey.missing:
        names = ", ".join(dataset.name for dataset in survey.missing[:20])
        more = len(survey.missing) - 20
        findings.fail(
            "data",
            f"missing datasets ({len(survey.missing)}): {names}"
            + (f" and {more} more" if more > 0 else "")
            + ". Put their files where the mixture file says, or set their ratio to 0",
        )
    for bad in survey.bad.values():
        in_words = ", ".join(f"{count} {reason}" for reason, count in bad.reasons.items())
        counted = f"bad records, {bad.count} ({in_words})"
        if bad.refused:
            remedy = f"Mend them, or leave them out with {SKIP}. All of them: {bad.listing}"
            findings.fail("data", f"{bad.name} has {counted}. {remedy}")
        else:
            findings.warn("data", f"{bad.name} goes without its {counted}: {bad.listing}")
    if dataset is None:
        return
    with findings.catch("data"):
        result.summary = data.DataSummary(run, dataset)
        checks.check_data(run, result.summary, dataset.plan, findings)
    if survey.incomplete and dataset.plan.folder.name not in survey.plans_before:
        # This run will never ask for it. One that was there before stays: a running job may read it.
        shutil.rmtree(dataset.plan.folder, ignore_errors=True)
    roots = pictures.list_images(dataset)
    if decode_images:
        result.bad_images = pictures.decode_all(
            roots, max_pixels=dataset.max_pixels, num_workers=run.dataset.get("num_workers")
        )
        result.decoded = sum(len(root.images) for root in roots)
    else:
        result.bad_images = pictures.find_missing(roots)
    if result.bad_images:
        lost = sum(image.reason == "missing_image" for image in result.bad_images)
        damaged = len(result.bad_images) - lost
        kinds = [("not there", lost), ("damaged or of a kind that can't be read", damaged)]
        in_words = "; ".join(f"images that are {kind}: {count}" for kind, count in kinds if count)
        findings.fail(
            "images",
            f"{in_words}. Mend them; or let training leave out their records: {SKIP} "
            f"train_dataloader.dataset.check_images={'decode' if damaged else 'header'} "
            "and a new cache (remove those of these datasets from the cache folder)",
        )


def _look_at_memory(result: Preflight, model: Any) -> None:
    run = result.run
    now = getattr(model.llm.model, "recomputed_layers", 0)
    counts = result.counts or {}

    @cache
    def memory(name: str, packs: int, layers: int = now) -> Memory:
        zero = run.zero if name == run.zero.name else _shipped(name, run)
        return count_memory(
            Step(
                {**run.cfg.model.to_dict(), "recomputed_layers": layers},
                zero,
                _fullest(result, model, packs),
                gpus=run.gpus,
                accumulation=run.accumulation * run.batch_size // packs,
                optimizer=run.optimizer,
                in_4_bit=sum(part.in_4_bit for part in counts.values()),
            )
        )

    result.memory = memory(run.zero.name, run.batch_size, now)
    total = result.memory.total / GIB
    layers = None
    if model.use_activation_checkpointing:
        sizes = partial(memory, run.zero.name, run.batch_size)
        most = len(model.llm.model.layers)
        with suppress(CannotCount):
            layers = _fewest_layers(sizes, most, (1 - SPARE) * result.gpu_memory * GIB)
    if layers is None:
        option = ""
    else:
        gib = memory(run.zero.name, run.batch_size, layers).total / GIB
        option = f"model.recomputed_layers={layers} ({gib:.0f} GiB)"
    if total > result.gpu_memory:
        result.findings.warn(
            "memory",
            f"{total:.0f} GiB are more than the {result.gpu_memory:g} GiB of a GPU. "
            + _what_would_fit(result, memory, option),
        )
    elif layers is not None and layers < now:
        saved = _recomputed_share(model, _fullest(result, model, run.batch_size), now, layers)
        result.findings.note(
            "memory",
            f"{option} fits, too, and saves {saved:.0%} of the operations: {now - layers} of "
            f"{now} layers would not be computed a second time in the backward pass",
        )


def _fewest_layers(size: Callable[[int], Memory], most: int, room: float) -> int | None:
    """Return how few of ``most`` layers can be recomputed, in ``room`` bytes; None if all don't help."""
    none, all_of_them = size(0), size(most)
    if none.total <= room or all_of_them.total > room:
        return 0 if none.total <= room else None
    # Each saves what it need not keep, unless another moment of the step hides it.
    layers = ceil((none.total - room) * most / (none.kept - all_of_them.kept))
    while layers < most and size(layers).total > room:
        layers += 1
    return min(layers, most)


def _shipped(name: str, run: RunConfig) -> ZeroSettings:
    return ZeroSettings.from_dict(name, read(name, run.cfg).settings)


def _recomputed_share(model: Any, batch: MicroBatch, now: int, layers: int) -> float:
    """Return which share of a micro-batch's operations goes, attention between tokens not counted."""
    flops, tokens = ModelFlops.of(model), batch.packs * batch.max_length
    work = flops.token * tokens + flops.learnt_token * batch.supervised + flops.image * batch.images
    layer = 2 * flops.token.forward * tokens / len(model.llm.model.layers)
    return layer * (now - layers) / (work.flops + layer * now)


def _fullest(result: Preflight, model: Any, packs: int) -> MicroBatch:
    """Return the fullest micro-batch: the plan's, or, where there is none, what the options allow."""
    run, data = result.run, result.summary
    if data is not None and packs == run.batch_size:
        images, supervised = data.images_per_micro_batch_max, data.learnt_per_micro_batch_max
    else:
        room = run.max_length // num_image_tokens(model.visual_encoder.config)
        images = packs * min(run.dataset.get("max_images", 16), room)
        supervised = packs * run.max_length
        if data is not None:  # a smaller micro-batch than the plan's
            images = min(images, data.images_per_pack_max * packs)
            supervised = min(supervised, data.learnt_per_micro_batch_max)
    # DeepSpeed converts the whole model, or leaves each part in the type that the config gives it.
    dtype = None if run.zero.precision == "fp32" else torch.bfloat16
    return MicroBatch(packs, run.max_length, supervised, images, dtype)


def _what_would_fit(result: Preflight, memory: Callable[[str, int], Memory], layers: str) -> str:
    """Try other DeepSpeed files and smaller micro-batches; ``layers`` is an option that fits, or empty."""
    run, counts = result.run, result.counts or {}
    choices = []
    run_kind = (run.zero.stage, run.zero.offloads("optimizer"))
    for name in ALTERNATIVES:
        zero = _shipped(name, run)
        if zero.stage == 3 and any(part.in_4_bit for part in counts.values()):
            continue  # it can't partition them
        if (zero.stage, zero.offloads("optimizer")) > run_kind:
            choices.append((f"--deepspeed {name}", name, run.batch_size))
    for size in range(run.batch_size // 2, 0, -1):
        factor, rest = divmod(run.batch_size, size)
        if not rest:  # else a step would have other packs
            text = f"batch_size {size} with {factor} x accumulative_counts"
            choices.append((text, run.zero.name, size))
    totals, unknown = dict[str, float](), []
    for text, name, size in choices:
        try:
            totals[text] = memory(name, size).total / GIB
        except CannotCount:
            unknown.append(text)
    fitting = [layers] * bool(layers)
    fitting += [f"{text} ({n:.0f} GiB)" for text, n in totals.items() if n <= result.gpu_memory]
    if fitting:
        texts = ["By the same count this would fit: " + "; or ".join(fitting)]
    else:
        texts = ["Neither another DeepSpeed file nor a smaller micro-batch alone would do"]
    if unknown:
        texts.append(f"Not counted: {', '.join(unknown)}")
    if "llm" in counts and counts["llm"].trainable > counts["llm"].total // 2:
        texts.append("LoRA on the language model (model.llm_lora) needs far less")
    return ". ".join(texts)

# SPDX-License-Identifier: Apache-2.0

"""The data of a run: planned as training plans them, going on where training would stop."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.core.errors import DataError, ModelLoadError
from gmai_xtuner.core.mixture import DatasetEntry, load_mixture, select
from gmai_xtuner.data.bad_records import BadRecords
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from gmai_xtuner.data.token_cache import TokenCache, open_cache
from gmai_xtuner.data.tokenization import ConversationTokenizer
from gmai_xtuner.data.tokenize_records import CacheOptions
from gmai_xtuner.preflight.findings import Findings
from gmai_xtuner.preflight.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class MissingDataset:
    """A dataset of which an annotation file or the image folder is not there."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BadDataset:
    """Bad records of a dataset.

    Args:
        name: of the dataset.
        count: how many; by ``reasons``.
        reasons: short key -> how many.
        listing: JSON Lines file with all of them (among others, where they were left out).
        refused: training stops because of them; otherwise it leaves them out.
    """

    name: str
    count: int
    reasons: dict[str, int]
    listing: Path
    refused: bool

    def notes(self) -> Iterator[dict[str, Any]]:
        """What is known of each, read from the file: there may be many."""
        with self.listing.open(encoding="utf-8") as lines:
            for line in lines:
                note = json.loads(line)
                if note["reason"] in self.reasons:
                    yield note


@dataclass(slots=True)
class Survey:
    """What came to light while the data were planned.

    Args:
        missing: datasets that are not there.
        bad: datasets with bad records, by name.
        unusable: datasets of which no record can be used.
        built: those whose token cache was not there and now is.
        opened: the caches, by name.
        plans_before: names of the plan folders that were there before this process made one.
    """

    missing: list[MissingDataset] = field(default_factory=list)
    bad: dict[str, BadDataset] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    built: list[str] = field(default_factory=list)
    opened: dict[str, TokenCache] = field(default_factory=dict)
    plans_before: set[str] = field(default_factory=set)

    @property
    def incomplete(self) -> bool:
        """Whether the plan is made without a part of the data."""
        return bool(self.missing or self.unusable or any(bad.refused for bad in self.bad.values()))


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One dataset of the mixture, as the stage sees it: records in its files, then what an epoch has of them.

    ``kept`` can be trained on, ``bad`` can't, of ``too_long`` nothing fits in a pack, of ``cut`` the first
    turns; ``held_out`` is validated on, ``neither`` has images of both sides, ``excluded`` is on the
    mixture's lists. ``tokens`` count those of images.
    """

    name: str
    category: str | None
    ratio: float
    records: int
    kept: int
    bad: int
    too_long: int
    cut: int
    held_out: int
    neither: int
    excluded: int
    conversations: int
    images: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DataSummary:
    """The plan of a run in numbers. An iteration is a micro-batch on each GPU, as in the log.

    ``conversations`` to ``packs`` are of one epoch, ``epochs`` (maybe a fraction), ``iterations`` and
    ``steps`` of the whole run; ``fill`` is tokens over what the packs hold, a micro-batch that of one GPU.
    """

    datasets: list[DatasetRow]
    conversations: int
    images: int
    tokens: int
    learnt_tokens: int
    packs: int
    fill: float
    images_per_pack_mean: float
    images_per_pack_max: int
    images_per_micro_batch_max: int
    learnt_per_micro_batch_max: int
    tokens_per_micro_batch_max: int
    iterations_per_epoch: int
    steps_per_epoch: int
    epochs: float
    iterations: int
    steps: int
    packs_per_step: int


class _PlanWithout(Exception):
    """A dataset turned out to be unusable: plan again without it, unless nothing is left."""

    def __init__(self, *, nothing_left: bool) -> None:
        self.nothing_left = nothing_left


class SurveyedDataset(SoftPackedDataset):
    """The training dataset, but what is missing or bad is noted, and the rest planned.

    Args:
        survey: takes the notes.
        findings: take what can't be noted for a dataset.
        arguments: of :class:`SoftPackedDataset`.
    """

    def __init__(self, *, survey: Survey, findings: Findings, **arguments: Any) -> None:
        self._survey = survey
        self._findings = findings
        super().__init__(**arguments)

    def _image_transform(self, *options: Any) -> ImageTransform:
        try:
            return super()._image_transform(*options)
        except ModelLoadError as error:
            self._findings.fail("vision tower", str(error))
            return None  # type: ignore[return-value]  # no image becomes pixels here

    def _choose(
        self, mixture: str, stage: str, quality: str | None
    ) -> list[tuple[DatasetEntry, float]]:
        chosen = []
        self._survey.missing.clear()
        everything = select(load_mixture(mixture, check_files=False), stage=stage, quality=quality)
        for entry, ratio in everything:
            paths = [str(path) for path in entry.annotations if not path.is_file()]
            if entry.image_root is not None and not entry.image_root.is_dir():
                paths.append(str(entry.image_root))
            if paths:
                self._survey.missing.append(MissingDataset(entry.name, tuple(paths)))
            elif entry.name not in self._survey.unusable:
                chosen.append((entry, ratio))
        if not chosen:
            raise _PlanWithout(nothing_left=True)
        return chosen

    def _open_caches(
        self,
        datasets: list[tuple[DatasetEntry, CacheOptions]],
        tokenizer: ConversationTokenizer,
        *,
        cache_dir: str,
        num_workers: int | None,
    ) -> list[TokenCache]:
        survey, before = self._survey, _folders(cache_dir, "tokens")
        unusable = len(survey.unusable)
        for entry, options in datasets:
            if entry.name in survey.opened:
                continue
            try:
                cache = open_cache(
                    entry, tokenizer, options, cache_dir=cache_dir, num_workers=num_workers
                )
            except BadRecords as error:
                survey.bad[entry.name] = BadDataset(
                    entry.name, error.count, error.reasons, error.listing, True
                )
                if error.rest is None:
                    survey.unusable.add(entry.name)
                else:
                    survey.opened[entry.name] = TokenCache(error.rest)
            except DataError as error:
                survey.unusable.add(entry.name)
                self._findings.fail("data", str(error))
            else:
                survey.opened[entry.name] = cache
                self._note_left_out(entry.name, cache)
                if cache.folder.name not in before:
                    survey.built.append(entry.name)
        if len(survey.unusable) > unusable:
            raise _PlanWithout(nothing_left=False)
        # Only now: caches take long to build, and a job may have begun in the meantime.
        survey.plans_before = _folders(cache_dir, "plans")
        return [survey.opened[entry.name] for entry, _ in datasets]

    def _note_left_out(self, name: str, cache: TokenCache) -> None:
        reasons = {key: n for key, n in cache.meta["skipped"].items() if key != "over_length"}
        if reasons:
            listing = cache.folder / "skipped.jsonl"
            self._survey.bad[name] = BadDataset(
                name, sum(reasons.values()), reasons, listing, False
            )

    def _log_summary(self, stage: str) -> None:
        """The report says it."""


def _folders(cache_dir: str, kind: str) -> set[str]:
    folder = Path(cache_dir) / kind
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def plan_data(run: RunConfig, findings: Findings) -> tuple[SurveyedDataset | None, Survey]:
    """Open or build the token caches and plan the first epoch, as training will.

    Args:
        run: the run.
        findings: take what makes the run fail and is no single dataset's fault.

    Returns:
        the dataset, or ``None`` if nothing can be planned, and the notes.
    """
    survey = Survey()
    arguments = run.dataset
    kind = arguments.pop("type", None)
    if kind not in ("SoftPackedDataset", SoftPackedDataset):
        findings.fail("data", f"train_dataloader.dataset is a {kind}, not a SoftPackedDataset")
        return None, survey
    try:
        inspect.signature(SoftPackedDataset).bind(**arguments)
    except TypeError as error:
        findings.fail("data", f"train_dataloader.dataset: {error}")
        return None, survey
    with findings.catch("data"):
        dataset = _build(arguments, survey, findings)
        if dataset is not None:
            dataset.plan.epoch(0)
        return dataset, survey
    return None, survey


def _build(arguments: dict[str, Any], survey: Survey, findings: Findings) -> SurveyedDataset | None:
    while True:
        try:
            return SurveyedDataset(survey=survey, findings=findings, **arguments)
        except _PlanWithout as error:
            if error.nothing_left:
                return None


def forget_plan(dataset: SoftPackedDataset, survey: Survey) -> None:
    """Remove a plan that this run will never ask for, because a part of the data was missing.

    One that was there before stays: a running job, whose mixture has no more than that part, reads it.
    """
    if dataset.plan.folder.name not in survey.plans_before:
        shutil.rmtree(dataset.plan.folder, ignore_errors=True)


def summarise(run: RunConfig, dataset: SoftPackedDataset) -> DataSummary:
    """Count what the plan of the first epoch holds, and how many iterations follow from it.

    Raises:
        GMAIError: options of the sampler that can't be, or no length of the run.
    """
    options = {
        **run.cfg.train_dataloader.get("batch_sampler", {}),
        "accumulative_counts": run.accumulation,
    }
    options.pop("type", None)
    sampler = MicroBatchSampler(
        PackSampler(dataset), run.batch_size, rank=0, world_size=run.gpus, **options
    )
    plan = dataset.plan.epoch(0)
    tokens, images, labels = (plan.total(name) for name in ("tokens", "images", "labels"))
    length = run.cfg.train_cfg
    iterations = sampler.run_length(length.get("max_epochs"), length.get("max_iters"))
    return DataSummary(
        datasets=_rows(dataset),
        conversations=int(plan.total("conversations").sum()),
        images=int(images.sum()),
        tokens=int(tokens.sum()),
        learnt_tokens=int(labels.sum()),
        packs=len(plan.packs),
        fill=float(tokens.sum() / (len(plan.packs) * dataset.max_length)),
        images_per_pack_mean=float(images.mean()),
        images_per_pack_max=int(images.max()),
        images_per_micro_batch_max=_most_in_a_micro_batch(images, run),
        learnt_per_micro_batch_max=_most_in_a_micro_batch(labels, run),
        tokens_per_micro_batch_max=_most_in_a_micro_batch(tokens, run),
        iterations_per_epoch=len(sampler),
        steps_per_epoch=sampler.steps,
        epochs=iterations / len(sampler),
        iterations=iterations,
        steps=sampler.steps_after(iterations),
        packs_per_step=sampler.packs_per_step,
    )


def _most_in_a_micro_batch(values: np.ndarray, run: RunConfig) -> int:
    """Largest sum over the packs that one GPU takes at a time (see ``datasets.sampler``)."""
    across = run.gpus * run.batch_size
    padded = np.zeros(-(-len(values) // across) * across)
    padded[: len(values)] = values
    return int(padded.reshape(-1, run.batch_size, run.gpus).sum(axis=1).max())


def _rows(dataset: SoftPackedDataset) -> list[DatasetRow]:
    plan = dataset.plan
    counts, kept_apart, excluded = plan.counts(), plan.held_out_counts(), plan.excluded()
    starts = np.searchsorted(plan.samples[:, 0], np.arange(len(plan.caches) + 1))
    rows = []
    for number, (entry, cache) in enumerate(zip(dataset.entries, plan.caches, strict=True)):
        part = counts[starts[number] : starts[number + 1]]
        skipped = cache.meta["skipped"]
        rows.append(
            DatasetRow(
                name=entry.name,
                category=entry.category,
                ratio=plan.ratios[number],
                records=cache.meta["records"],
                kept=cache.meta["kept"],
                bad=sum(n for reason, n in skipped.items() if reason != "over_length"),
                too_long=skipped.get("over_length", 0),
                cut=cache.meta["cut"],
                held_out=int(kept_apart[number, 0]),
                neither=int(kept_apart[number, 1]),
                excluded=excluded.conversations[number],
                conversations=len(part),
                images=int(part[:, 2].sum()),
                tokens=int(part[:, 0].sum(dtype=np.int64)),
            )
        )
    return rows

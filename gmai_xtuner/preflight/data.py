# SPDX-License-Identifier: Apache-2.0

"""The data of a run: planned as training plans them, going on where training would stop."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.core.archives import archives_of
from gmai_xtuner.core.errors import DataError, GMAIError, ModelLoadError
from gmai_xtuner.core.mixture import DatasetEntry, load_mixture, select
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from gmai_xtuner.data.token_cache import OpenCache, TokenCache
from gmai_xtuner.data.tokenize_records import BadRecords
from gmai_xtuner.preflight.run_config import Findings, RunConfig


@dataclass(frozen=True, slots=True)
class MissingDataset:
    """A dataset of which an annotation file or the image folder is not there."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BadDataset:
    """Bad records of a dataset: how many for each reason (a short key), and the JSON Lines file with them.

    Training stops because of them (``refused``), or leaves them out, and then the file lists others too.
    """

    name: str
    reasons: dict[str, int]
    listing: Path
    refused: bool

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of each, read from the file: there may be many."""
        with self.listing.open(encoding="utf-8") as lines:
            for line in lines:
                note = json.loads(line)
                if note["reason"] in self.reasons:
                    yield note


@dataclass(slots=True)
class Survey:
    """What came to light while the data were planned.

    Args:
        missing, bad: datasets that are not there, and those with bad records, by name.
        unusable: whether there are datasets of which no record can be used.
        built: those whose token cache was not there and now is.
        plans_before: names of the plan folders that were there before this process made one.
    """

    missing: list[MissingDataset] = field(default_factory=list)
    bad: dict[str, BadDataset] = field(default_factory=dict)
    unusable: bool = False
    built: list[str] = field(default_factory=list)
    plans_before: set[str] = field(default_factory=set)

    @property
    def incomplete(self) -> bool:
        """Whether the plan is made without a part of the data."""
        return bool(self.missing or self.unusable or any(bad.refused for bad in self.bad.values()))


class _NothingToPlan(Exception):
    """No dataset is there with a usable record."""


class SurveyedDataset(SoftPackedDataset):
    """The training dataset, but what is missing or bad is noted, and the rest planned.

    ``survey`` takes the notes, ``findings`` what can't be noted for a dataset.
    """

    def __init__(
        self, *, survey: Survey, findings: Findings, cache_dir: str, **arguments: Any
    ) -> None:
        self._survey, self._findings, self._cache_dir = survey, findings, cache_dir
        super().__init__(cache_dir=cache_dir, **arguments)

    def _image_transform(self, *options: Any, **more: Any) -> ImageTransform:
        try:
            return super()._image_transform(*options, **more)
        except ModelLoadError as error:
            self._findings.fail("vision tower", str(error))
            return None  # type: ignore[return-value]  # no image becomes pixels here

    def _open_caches(
        self, mixture: str, stage: str, quality: str | None, opened: OpenCache
    ) -> list[tuple[DatasetEntry, float, TokenCache]]:
        survey, before = self._survey, _folders(self._cache_dir, "tokens")
        found = []
        everything = select(load_mixture(mixture, check_files=False), stage=stage, quality=quality)
        for entry, ratio in everything:
            paths = [str(path) for path in entry.annotations if not path.is_file()]
            root = entry.image_root
            if root is not None and not (root.is_dir() or archives_of(root)):
                paths.append(str(entry.image_root))
            if paths:
                survey.missing.append(MissingDataset(entry.name, tuple(paths)))
                continue
            cache = self._open(entry, opened)
            if cache is None:
                survey.unusable = True
                continue
            found.append((entry, ratio, cache))
            refused = entry.name in survey.bad and survey.bad[entry.name].refused
            if cache.folder.name not in before and not refused:
                survey.built.append(entry.name)
        if not found:
            raise _NothingToPlan
        # Only now: caches take long to build, and a job may have begun in the meantime.
        survey.plans_before = _folders(self._cache_dir, "plans")
        return found

    def _open(self, entry: DatasetEntry, opened: OpenCache) -> TokenCache | None:
        """Open a cache, or that of the good records alone; ``None`` if no record can be used."""
        try:
            cache = opened(entry)
        except BadRecords as error:
            bad = BadDataset(entry.name, error.reasons, error.listing, True)
            self._survey.bad[entry.name] = bad
            return None if error.rest is None else TokenCache(error.rest)
        except DataError as error:
            self._findings.fail("data", str(error))
            return None
        reasons = {key: n for key, n in cache.meta["skipped"].items() if key != "over_length"}
        if reasons:
            listing = cache.folder / "skipped.jsonl"
            self._survey.bad[entry.name] = BadDataset(entry.name, reasons, listing, False)
        return cache

    def _log_summary(self, stage: str) -> None:
        """The report says it."""


def _folders(cache_dir: str, kind: str) -> set[str]:
    folder = Path(cache_dir) / kind
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def plan_data(run: RunConfig, findings: Findings) -> tuple[SurveyedDataset | None, Survey]:
    """Open or build the token caches and plan the first epoch, as training will; ``None`` if nothing can be.

    What makes the run fail and is no single dataset's fault goes to the findings.
    """
    survey, arguments = Survey(), run.dataset
    kind = arguments.pop("type", None)
    with findings.catch("data"), suppress(_NothingToPlan):
        if kind not in ("SoftPackedDataset", SoftPackedDataset):
            raise GMAIError(f"train_dataloader.dataset is a {kind}, not a SoftPackedDataset")
        try:
            inspect.signature(SoftPackedDataset).bind(**arguments)
        except TypeError as error:
            raise GMAIError(f"train_dataloader.dataset: {error}") from error
        dataset = SurveyedDataset(survey=survey, findings=findings, **arguments)
        dataset.plan.epoch(0)
        return dataset, survey
    return None, survey


class DataSummary:
    """The plan of a run in numbers. An iteration is a micro-batch on each GPU, as in the log.

    ``conversations`` to ``packs`` are of one epoch, ``epochs`` (maybe a fraction), ``iterations`` and
    ``steps`` of the whole run; ``fill`` is tokens over what the packs hold, a micro-batch that of one GPU.

    Raises:
        GMAIError: options of the sampler that can't be, or no length of the run.
    """

    def __init__(self, run: RunConfig, dataset: SoftPackedDataset) -> None:
        options = {**run.cfg.train_dataloader.get("batch_sampler", {})}
        options |= {"accumulative_counts": run.accumulation, "rank": 0, "world_size": run.gpus}
        options.pop("type", None)
        sampler = MicroBatchSampler(PackSampler(dataset), run.batch_size, **options)
        plan, length = dataset.plan.epoch(0), run.cfg.train_cfg
        tokens, images, labels = (plan.total(name) for name in ("tokens", "images", "labels"))
        self.datasets = dataset.rows()
        self.conversations = int(plan.total("conversations").sum())
        self.images = int(images.sum())
        self.tokens = int(tokens.sum())
        self.learnt_tokens = int(labels.sum())
        self.packs = len(plan.packs)
        self.fill = float(tokens.sum() / (self.packs * dataset.max_length))
        self.images_per_pack_mean = float(images.mean())
        self.images_per_pack_max = int(images.max())
        self.images_per_micro_batch_max = _most_in_a_micro_batch(images, run)
        self.learnt_per_micro_batch_max = _most_in_a_micro_batch(labels, run)
        self.iterations_per_epoch = len(sampler)
        self.steps_per_epoch = sampler.steps
        self.iterations = sampler.run_length(length.get("max_epochs"), length.get("max_iters"))
        self.epochs = self.iterations / len(sampler)
        self.steps = sampler.steps_after(self.iterations)
        self.packs_per_step = sampler.packs_per_step


def _most_in_a_micro_batch(values: np.ndarray, run: RunConfig) -> int:
    """Return the largest sum over the packs that one GPU takes at a time (see ``data/sampler.py``)."""
    across = run.gpus * run.batch_size
    padded = np.zeros(-(-len(values) // across) * across)
    padded[: len(values)] = values
    return int(padded.reshape(-1, run.batch_size, run.gpus).sum(axis=1).max())

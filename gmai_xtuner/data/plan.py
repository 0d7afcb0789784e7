"""The data plan on disk: which conversations are trained on, and how each epoch packs them.

A plan is a folder ``<cache_dir>/plans/<key>/``::

    held-out.npy            int64 [datasets, 2]: conversations held out, and on neither side
    excluded.json           conversations of each dataset that a list leaves out, and lines of the lists of
                            which no conversation is
    samples.npy             uint32 [samples, 2]: dataset, row in its token cache (after sampling by ratio)
    epoch-<e>-offsets.npy   int64 [packs + 1] into
    epoch-<e>-items.npy     int64 [samples], indices into samples.npy
    epoch-<e>-digest.npy    uint8 [32], SHA-256 of samples, offsets and items
    epoch-<e>-totals.npy    float64 [packs, 5]: tokens, images, conversations, learnt tokens,
                            sum of the square roots of each conversation's learnt tokens

Everything is a pure function of the token caches, the ratios, the exclude lists, the held-out share, the
seed and the epoch, made once under a file lock and memory-mapped by every rank and worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gmai_xtuner.core.errors import GMAIError, MixtureError
from gmai_xtuner.core.exclusion import SHOWN, Exclusions
from gmai_xtuner.core.files import locked, replace_text, staged
from gmai_xtuner.core.mixture import sample_indices
from gmai_xtuner.data import held_out as held_out_module
from gmai_xtuner.data.held_out import EXCLUDED, HELD_OUT, NEITHER, TRAIN
from gmai_xtuner.data.packing import Packs, pack
from gmai_xtuner.data.token_cache import TokenCache

VERSION = 3
"""Goes up with whatever changes which conversations share a pack."""

TOTALS = ("tokens", "images", "conversations", "labels", "sqrt_labels")


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The packs of one epoch and their totals, see the module.

    ``digest``: of which conversations lie in which pack, hexadecimal; the same on all machines that train
    on the same.
    """

    packs: Packs
    totals: np.ndarray
    digest: str

    def total(self, name: str) -> np.ndarray:
        """float64 ``[packs]`` of one of :data:`TOTALS`."""
        return self.totals[:, TOTALS.index(name)]


@dataclass(frozen=True, slots=True)
class Excluded:
    """What the exclude lists leave out of a plan.

    Args:
        conversations: of each dataset's token cache.
        unknown: lines of the lists of which the stage has no conversation.
        examples: some of these lines.
    """

    conversations: tuple[int, ...]
    unknown: int
    examples: tuple[str, ...]


def unknown_lines(excluded: Excluded) -> str:
    """What is to be said of lines of which no conversation is."""
    more = excluded.unknown - len(excluded.examples[:5])
    told = "; ".join(excluded.examples[:5]) + (f"; and {more} more" if more else "")
    return (
        f"{excluded.unknown} line(s) of the exclude lists name nothing that this stage has: {told}. They are "
        "misspelt, of another version of the data, or already left out as bad or too long"
    )


class DataPlan:
    """Sampling by ratio, then soft packing for each epoch.

    Args:
        caches: token caches in the order of the mixture.
        names: their names; each draws its sample by its own name, so that adding a dataset leaves the
            samples of the others as they are.
        ratios: how much of each; 2.5 is every conversation twice and a random half once more. The
            sample is drawn once and holds for all epochs.
        seed: of the sample and the packing.
        max_length: tokens of a pack.
        max_images: images of a pack.
        cache_dir: where plans are kept.
        held_out: share of the images (and of the conversations without one) that is kept for
            validation, see :mod:`gmai_xtuner.data.held_out`; it is taken before the sampling by ratio.
        split: ``train``, or ``held_out`` for a plan of what the other does not train on: each
            conversation once, whatever the ratios.
        at_most: conversations of a dataset in the ``held_out`` split; default: all.
        exclusions: conversations that are left out on both sides. The sample of the others is the same as
            without: what is left out falls out of it, so the ratio holds for all, not for what remains.

    Raises:
        MixtureError: the ratios leave nothing to train on.
        GMAIError: the share is not between 0 and 1.
    """

    def __init__(
        self,
        caches: Sequence[TokenCache],
        *,
        names: Sequence[str],
        ratios: Sequence[float],
        seed: int,
        max_length: int,
        max_images: int,
        cache_dir: str | Path,
        held_out: float = 0.0,
        split: str = "train",
        at_most: int | None = None,
        exclusions: Exclusions | None = None,
    ) -> None:
        if not 0 <= held_out < 1 or split not in ("train", "held_out"):
            raise GMAIError(
                "held_out must be a share of at least 0 and below 1, and split 'train' or 'held_out', got "
                f"{held_out!r} and {split!r}"
            )
        self.caches = list(caches)
        self.names = list(names)
        self.ratios = list(ratios)
        self.seed = seed
        self.max_length = max_length
        self.max_images = max_images
        self.held_out = held_out
        self.split = split
        self.at_most = at_most
        self.exclusions = exclusions or None
        ingredients: list[object] = [
            VERSION,
            [(cache.folder.name, cache.meta["content"]) for cache in caches],
            self.names,
            self.ratios,
            seed,
            max_length,
            max_images,
            held_out,
            split,
            at_most,
        ]
        if self.exclusions:
            ingredients.append(self.exclusions.digest)
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir).absolute() / "plans" / key
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "samples.npy").is_file():
            with locked(self.folder / ".lock", "draw the samples"):
                if not (self.folder / "samples.npy").is_file():
                    self._save("samples", self._draw())
        self.samples: np.ndarray = np.load(self.folder / "samples.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        del state["samples"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.samples = np.load(self.folder / "samples.npy", mmap_mode="r")

    def epoch(self, epoch: int) -> EpochPlan:
        """The packs of this epoch, made first if no process has made them."""
        return _open_epoch(self, epoch)

    @property
    def settings(self) -> dict[str, object]:
        """What the user has set of it, to be named where two plans differ."""
        return {
            "ratios": dict(zip(self.names, self.ratios, strict=True)),
            "seed": self.seed,
            "max_length": self.max_length,
            "max_images": self.max_images,
            "held_out": self.held_out,
            # Not named where there is none: a run from before there were lists goes on.
            **({"exclude": self.exclusions.digest} if self.exclusions else {}),
        }

    def why_nothing_held_out(self) -> str:
        """Of how many images the share holds nothing out, and the smallest that does; reads all names."""
        excluded: list[np.ndarray | None] = [None] * len(self.caches)
        if self.exclusions:
            excluded = [
                part.rows(cache.folder)[0] if part else None
                for cache, part in zip(self.caches, self.exclusions.datasets, strict=True)
            ]
        folders = [cache.folder for cache in self.caches]
        return held_out_module.nothing_held_out(self.held_out, folders, excluded)

    def held_out_counts(self) -> np.ndarray:
        """int64 ``[datasets, 2]``: conversations held out, and with images of both sides."""
        return np.load(self.folder / "held-out.npy")

    def excluded(self) -> Excluded:
        """What the lists leave out."""
        if not self.exclusions:
            return Excluded((0,) * len(self.caches), 0, ())
        told = json.loads((self.folder / "excluded.json").read_text(encoding="utf-8"))
        return Excluded(tuple(told["conversations"]), told["unknown"], tuple(told["examples"]))

    def _exclude(self) -> list[np.ndarray | None]:
        """bool ``[conversations]`` of each dataset: left out; ``None`` where nothing is."""
        if not self.exclusions:
            return [None] * len(self.caches)
        masks, found = [], []
        for cache, exclusion in zip(self.caches, self.exclusions.datasets, strict=True):
            mask, there = exclusion.rows(cache.folder) if exclusion else (None, exclusion)
            masks.append(mask)
            found.append(there)
        unknown = self.exclusions.unknown(self.names, found)
        told = {
            "conversations": [0 if mask is None else int(mask.sum()) for mask in masks],
            "unknown": len(unknown),
            "examples": unknown[:SHOWN],
        }
        replace_text(self.folder / "excluded.json", json.dumps(told))
        return masks

    def _draw(self) -> np.ndarray:
        parts, counts = [], np.zeros((len(self.caches), 2), dtype=np.int64)
        excluded = self._exclude()
        for number, (cache, name, ratio) in enumerate(
            zip(self.caches, self.names, self.ratios, strict=True)
        ):
            rows = np.arange(len(cache))
            if self.held_out:
                sides = held_out_module.sides(cache.folder, self.held_out)
                counts[number] = [(sides.side == side).sum() for side in (HELD_OUT, NEITHER)]
                rows = sides.rows(TRAIN)
            mask = excluded[number]
            if mask is not None and self.held_out:
                counts[number] -= [(sides.side[mask] == side).sum() for side in (HELD_OUT, NEITHER)]
                sides.side[mask] = EXCLUDED
            if self.split == "train":
                rows = rows[sample_indices(len(rows), ratio, seed=self.seed, name=name)]
                rows = rows if mask is None else rows[~mask[rows]]
            else:
                rows = sides.rows(HELD_OUT, at_most=self.at_most) if self.held_out else rows[:0]
            parts.append(np.stack([np.full_like(rows, number), rows], axis=1).astype(np.uint32))
        # Before the samples, whose presence says that everything is there.
        self._save("held-out", counts)
        samples = np.concatenate(parts)
        if not len(samples) and self.split == "train":
            datasets = ", ".join(
                f"{name} (ratio {ratio:g} of {len(cache)})"
                for cache, name, ratio in zip(self.caches, self.names, self.ratios, strict=True)
            )
            lists = " and the exclude lists" if self.exclusions else ""
            raise MixtureError(
                f"the ratios{lists} leave no conversation of {datasets}. Raise one in the mixture file."
            )
        return samples

    def counts(self) -> np.ndarray:
        """int32 ``[samples, 3]``: tokens, learnt tokens, images of each sample."""
        dataset, row = self.samples[:, 0], self.samples[:, 1]
        counts = np.empty((len(self.samples), 3), dtype=np.int32)
        starts = np.searchsorted(dataset, np.arange(len(self.caches) + 1))
        for number, cache in enumerate(self.caches):
            part = slice(starts[number], starts[number + 1])
            counts[part] = cache.counts[row[part]]
        return counts

    def _build_epoch(self, epoch: int) -> None:
        counts = self.counts()
        packs = pack(
            counts[:, 0],
            max_length=self.max_length,
            images=counts[:, 2],
            max_images=self.max_images,
            seed=[self.seed, epoch],
        )
        tokens, labels, images = (counts[packs.items, i].astype(np.float64) for i in range(3))
        columns = [tokens, images, np.ones_like(tokens), labels, np.sqrt(labels)]
        starts = packs.offsets[:-1]
        totals = np.stack([np.add.reduceat(column, starts) for column in columns], axis=1)
        self._save(f"epoch-{epoch}-offsets", packs.offsets)
        self._save(f"epoch-{epoch}-items", packs.items)
        self._save(f"epoch-{epoch}-digest", _digest(self.samples, packs.offsets, packs.items))
        self._save(f"epoch-{epoch}-totals", totals)

    def _save(self, name: str, array: np.ndarray) -> None:
        with staged(self.folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, array)


@lru_cache(maxsize=4)
def _open_epoch(plan: DataPlan, epoch: int) -> EpochPlan:
    # The totals are written last: when they are there, everything is.
    totals = plan.folder / f"epoch-{epoch}-totals.npy"
    if not totals.is_file():
        with locked(plan.folder / ".lock", f"pack epoch {epoch}"):
            if not totals.is_file():
                plan._build_epoch(epoch)
    offsets, items, sums = (
        np.load(plan.folder / f"epoch-{epoch}-{name}.npy", mmap_mode="r")
        for name in ("offsets", "items", "totals")
    )
    if epoch and len(sums) != len(plan.epoch(0).packs):
        raise GMAIError(
            f"epoch {epoch} has {len(sums)} packs, epoch 0 {len(plan.epoch(0).packs)}: they were planned by "
            f"different versions. Remove {plan.folder} and start the run anew"
        )
    digest = np.load(plan.folder / f"epoch-{epoch}-digest.npy").tobytes().hex()
    return EpochPlan(Packs(offsets, items), sums, digest)


def _digest(*arrays: np.ndarray) -> np.ndarray:
    """SHA-256 of the contents, uint8 ``[32]``."""
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).data)
    return np.frombuffer(content.digest(), dtype=np.uint8)

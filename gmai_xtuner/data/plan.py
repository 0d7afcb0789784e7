# SPDX-License-Identifier: Apache-2.0

"""The data plan on disk: which conversations are trained on, and how each epoch packs them.

A plan is a folder ``<cache_dir>/plans/<key>/``::

    held-out.npy            int64 [datasets, 2]: conversations held out, and those left out of both splits,
                            since they have images of both
    excluded.json           conversations of each dataset that a list leaves out, and lines of the lists of
                            which no conversation is
    samples.npy             uint32 [samples, 2]: dataset, row in its token cache (after sampling by ratio)
    epoch-<e>-offsets.npy   int64 [packs + 1] into
    epoch-<e>-items.npy     int64 [samples], indices into samples.npy
    epoch-<e>-digest.npy    uint8 [32], SHA-256 of samples, offsets and items
    epoch-<e>-totals.npy    float64 [packs, 5]: tokens, images, conversations, supervised
                            tokens, sum of the square roots of each conversation's supervised tokens

Everything is a pure function of the token caches, the ratios, the exclude lists, the held-out share, the
seed and the epoch, made once under a file lock and memory-mapped by every rank and worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmai_xtuner.core.errors import GMAIError, MixtureError
from gmai_xtuner.core.exclusion import Exclusion, Exclusions
from gmai_xtuner.core.files import locked, replace_text, staged
from gmai_xtuner.core.mixture import sample_indices
from gmai_xtuner.data.held_out import EXCLUDED, HELD_OUT, NEITHER, TRAIN, nothing_held_out, sides
from gmai_xtuner.data.log import warn
from gmai_xtuner.data.packing import Packs, pack
from gmai_xtuner.data.token_cache import TokenCache

_EXAMPLES = 20
"""Names of exclude lists without a conversation that are kept as examples."""

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
    """The count of what the exclude lists leave out of each dataset's token cache.

    ``unknown``: lines of the lists of which the stage has no conversation; ``examples``: some of them.
    """

    conversations: tuple[int, ...]
    unknown: int
    examples: tuple[str, ...]


def unknown_lines(excluded: Excluded) -> str:
    """Return the warning about lines of the exclude lists that name no conversation."""
    more = excluded.unknown - len(excluded.examples[:5])
    examples = "; ".join(excluded.examples[:5]) + (f"; and {more} more" if more else "")
    return (
        f"{excluded.unknown} line(s) of the exclude lists name nothing that this stage has: {examples}. They "
        "are misspelt, of another version of the data, or already left out as bad or too long"
    )


@dataclass(eq=False)
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

    caches: Sequence[TokenCache]
    _: KW_ONLY
    names: Sequence[str]
    ratios: Sequence[float]
    seed: int
    max_length: int
    max_images: int
    cache_dir: str | Path
    held_out: float = 0.0
    split: str = "train"
    at_most: int | None = None
    exclusions: Exclusions | None = None

    def __post_init__(self) -> None:
        self.exclusions = self.exclusions or None
        if not 0 <= self.held_out < 1 or self.split not in ("train", "held_out"):
            raise GMAIError(
                "held_out must be a share of at least 0 and below 1, and split 'train' or 'held_out', got "
                f"{self.held_out!r} and {self.split!r}"
            )
        contents = [(cache.folder.name, cache.meta["content"]) for cache in self.caches]
        ingredients = [
            *(VERSION, contents, list(self.names), list(self.ratios), self.seed, self.max_length),
            *(self.max_images, self.held_out, self.split, self.at_most),
            *([self.exclusions.digest] if self.exclusions else []),
        ]
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]
        self.folder = Path(self.cache_dir).absolute() / "plans" / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_what_is_cut_off()
        self._make("samples", "draw the samples", self._draw)

    def _remove_what_is_cut_off(self) -> None:
        """Let a plan of which a file is not whole be made anew: it is the same again."""
        if any(map(_is_cut_off, self.folder.iterdir())):
            with locked(self.folder / ".lock", "mend the plan"):
                cut = sorted(file.name for file in self.folder.iterdir() if _is_cut_off(file))
                for file in self.folder.iterdir() if cut else ():
                    if file.suffix in (".npy", ".json"):
                        file.unlink()
            if cut:
                warn(f"{self.folder}: {', '.join(cut)} cut off or damaged. The plan is made anew")

    @cached_property
    def samples(self) -> np.ndarray:
        """uint32 ``[samples, 2]``, see the module."""
        return np.load(self.folder / "samples.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "samples"}

    def epoch(self, epoch: int) -> EpochPlan:
        """Return the packs of this epoch, planned first if no process has planned them."""
        return _open_epoch(self, epoch)

    @property
    def settings(self) -> dict[str, object]:
        """The settings to name where two plans differ."""
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
        """Say of how many images the share holds nothing out, and the smallest that does; reads all names."""
        excluded, _ = self._find_excluded()
        return nothing_held_out(self.held_out, [cache.folder for cache in self.caches], excluded)

    def held_out_counts(self) -> np.ndarray:
        """int64 ``[datasets, 2]``: conversations held out, and with images of both sides."""
        return np.load(self.folder / "held-out.npy")

    def excluded(self) -> Excluded:
        """Return what the exclude lists leave out."""
        if not self.exclusions:
            return Excluded((0,) * len(self.caches), 0, ())
        found = json.loads((self.folder / "excluded.json").read_text(encoding="utf-8"))
        return Excluded(tuple(found["conversations"]), found["unknown"], tuple(found["examples"]))

    def _find_excluded(self) -> tuple[list[np.ndarray | None], list[Exclusion]]:
        """Return :func:`_rows_of` each dataset (``None`` without a list), and what of its lists is there."""
        nothing = Exclusion()
        parts = self.exclusions.datasets if self.exclusions else [nothing] * len(self.caches)
        found = [
            _rows_of(part, cache.folder) if part else (None, nothing)
            for part, cache in zip(parts, self.caches, strict=True)
        ]
        return [mask for mask, _ in found], [in_use for _, in_use in found]

    def _draw(self) -> np.ndarray:
        """Return the samples; save how many conversations are held out, and how many excluded."""
        parts, counts = [], np.zeros((len(self.caches), 2), dtype=np.int64)
        excluded, in_use = self._find_excluded()
        if self.exclusions:
            unknown = self.exclusions.unknown(in_use)
            content = {
                "conversations": [0 if mask is None else int(mask.sum()) for mask in excluded],
                "unknown": len(unknown),
                "examples": unknown[:_EXAMPLES],
            }
            replace_text(self.folder / "excluded.json", json.dumps(content))
        for number, (cache, name, ratio) in enumerate(
            zip(self.caches, self.names, self.ratios, strict=True)
        ):
            rows, mask = np.arange(len(cache)), excluded[number]
            if self.held_out:
                part = sides(cache.folder, self.held_out)
                # Before the exclusion, which does not change the sample of the others.
                rows = part.rows(TRAIN)
                if mask is not None:
                    part.side[mask] = EXCLUDED
                counts[number] = [(part.side == side).sum() for side in (HELD_OUT, NEITHER)]
            if self.split == "train":
                rows = rows[sample_indices(len(rows), ratio, seed=self.seed, name=name)]
                rows = rows if mask is None else rows[~mask[rows]]
            else:
                rows = part.rows(HELD_OUT, at_most=self.at_most) if self.held_out else rows[:0]
            parts.append(np.stack([np.full_like(rows, number), rows], axis=1).astype(np.uint32))
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

    def counts_by_dataset(self) -> list[np.ndarray]:
        """Return int32 ``[samples, 3]`` of each dataset: tokens, supervised tokens, images of each sample."""
        dataset, row = self.samples[:, 0], self.samples[:, 1]
        rows = np.split(row, np.searchsorted(dataset, np.arange(1, len(self.caches))))
        return [cache.counts[own] for cache, own in zip(self.caches, rows, strict=True)]

    def counts(self) -> np.ndarray:
        """Return :meth:`counts_by_dataset` of all, int32 ``[samples, 3]``."""
        return np.concatenate(self.counts_by_dataset())

    def _build_epoch(self, epoch: int) -> np.ndarray:
        """Save the packs of an epoch and return their totals."""
        counts = self.counts()
        packs = pack(
            counts[:, 0],
            max_length=self.max_length,
            images=counts[:, 2],
            max_images=self.max_images,
            seed=[self.seed, epoch],
        )
        digest = hashlib.sha256()
        for array in (self.samples, packs.offsets, packs.items):
            digest.update(np.ascontiguousarray(array).data)
        self._save(f"epoch-{epoch}-offsets", packs.offsets)
        self._save(f"epoch-{epoch}-items", packs.items)
        self._save(f"epoch-{epoch}-digest", np.frombuffer(digest.digest(), dtype=np.uint8))
        tokens, labels, images = (counts[packs.items, i].astype(np.float64) for i in range(3))
        columns = [tokens, images, np.ones_like(tokens), labels, np.sqrt(labels)]
        return np.stack([np.add.reduceat(column, packs.offsets[:-1]) for column in columns], axis=1)

    def _make(self, name: str, what: str, build: Callable[[], np.ndarray]) -> None:
        """Save ``build()`` under a name if no process has done so; its other files are there before it."""
        if not (self.folder / f"{name}.npy").is_file():
            with locked(self.folder / ".lock", what):
                if not (self.folder / f"{name}.npy").is_file():
                    self._save(name, build())

    def _save(self, name: str, array: np.ndarray) -> None:
        with staged(self.folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, array)


def _rows_of(exclusion: Exclusion, cache: Path) -> tuple[np.ndarray, Exclusion]:
    """Return bool ``[conversations]`` of a token cache, what is left out, and the part of the list in use."""
    ids = pa.array(sorted(exclusion.ids), pa.string())
    images = pa.array(sorted(exclusion.images), pa.string())
    found_ids: set[str] = set()
    found_images: set[str] = set()
    parts = [np.zeros(0, dtype=bool)]
    reader = pa.ipc.open_file(pa.memory_map(str(cache / "tokens.arrow")))
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        own, shown = batch.column("id"), batch.column("images")
        by_id = pc.is_in(own, value_set=ids)
        by_image = pc.is_in(shown.values, value_set=images)
        found_ids.update(own.filter(by_id).to_pylist())
        found_images.update(shown.values.filter(by_image).to_pylist())
        # Images on the list before each: where that number rises within a conversation, it has one.
        before = np.concatenate([[0], np.cumsum(by_image.to_numpy(zero_copy_only=False))])
        offsets = shown.offsets.to_numpy()
        has_image = before[offsets[1:]] > before[offsets[:-1]]
        parts.append(by_id.to_numpy(zero_copy_only=False) | has_image)
    return np.concatenate(parts), Exclusion(frozenset(found_ids), frozenset(found_images))


def _is_cut_off(file: Path) -> bool:
    try:
        if file.suffix == ".npy":
            np.load(file, mmap_mode="r")
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # a process beside this one has replaced it
        return False
    except (OSError, ValueError, EOFError):
        return True
    return False


@lru_cache(maxsize=4)
def _open_epoch(plan: DataPlan, epoch: int) -> EpochPlan:
    name = f"epoch-{epoch}"
    plan._make(f"{name}-totals", f"pack epoch {epoch}", lambda: plan._build_epoch(epoch))
    offsets, items, totals = (
        np.load(plan.folder / f"{name}-{part}.npy", mmap_mode="r")
        for part in ("offsets", "items", "totals")
    )
    if epoch and len(totals) != len(plan.epoch(0).packs):
        raise GMAIError(
            f"epoch {epoch} has {len(totals)} packs, epoch 0 {len(plan.epoch(0).packs)}: they were planned "
            f"by different versions. Remove {plan.folder} and start the run anew"
        )
    digest = np.load(plan.folder / f"{name}-digest.npy").tobytes().hex()
    return EpochPlan(Packs(offsets, items), totals, digest)

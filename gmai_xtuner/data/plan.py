"""The data plan on disk: which conversations are trained on, and how each epoch packs them.

A plan is a folder ``<cache_dir>/plans/<key>/``::

    held-out.npy            int64 [datasets, 2]: conversations held out, and on neither side
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

**Held out.** An image, named by its path below the image root, is kept for validation if a hash of that name
falls below the share asked for; a conversation without images goes by its id. Nothing else has a say: not
the seed, the ratios, the stage or the other datasets. So an image is on the same side in every dataset and
every stage, stage 3 validates on nothing that stage 1 has seen, and more data leaves what was held out as it
was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmai_xtuner.core.errors import GMAIError, MixtureError
from gmai_xtuner.core.exclusion import Exclusion, Exclusions
from gmai_xtuner.core.files import locked, replace_text, staged
from gmai_xtuner.core.mixture import sample_indices
from gmai_xtuner.data.packing import Packs, pack
from gmai_xtuner.data.token_cache import TokenCache

_EXAMPLES = 20
"""Names of exclude lists without a conversation that are kept as examples."""

VERSION = 3
"""Goes up with whatever changes which conversations share a pack."""

TOTALS = ("tokens", "images", "conversations", "labels", "sqrt_labels")

TRAIN, HELD_OUT, NEITHER, EXCLUDED = range(4)
"""Sides of a conversation; :data:`NEITHER` has images of both, :data:`EXCLUDED` is on an exclude list."""


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
    """The count of what the exclude lists leave out of a plan.

    Args:
        conversations: of each dataset's token cache.
        unknown: lines of the lists of which the stage has no conversation.
        examples: some of these lines.
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
            validation, see the module; it is taken before the sampling by ratio.
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
        if not 0 <= self.held_out < 1 or self.split not in ("train", "held_out"):
            raise GMAIError(
                "held_out must be a share of at least 0 and below 1, and split 'train' or 'held_out', got "
                f"{self.held_out!r} and {self.split!r}"
            )
        self.exclusions = self.exclusions or None
        contents = [(cache.folder.name, cache.meta["content"]) for cache in self.caches]
        ingredients: list[object] = [VERSION, contents, list(self.names), list(self.ratios)]
        ingredients += [self.seed, self.max_length, self.max_images]
        ingredients += [self.held_out, self.split, self.at_most]
        if self.exclusions:
            ingredients.append(self.exclusions.digest)
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]
        self.folder = Path(self.cache_dir).absolute() / "plans" / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make("samples", "draw the samples", self._draw)

    @cached_property
    def samples(self) -> np.ndarray:
        """uint32 ``[samples, 2]``, see the module."""
        return np.load(self.folder / "samples.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "samples"}

    def held_out_plan(self, at_most: int | None = None) -> DataPlan:
        """Return the plan of what this one holds out; ``at_most`` conversations of a dataset."""
        return replace(self, split="held_out", at_most=at_most)

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
        parts = self.exclusions.datasets if self.exclusions else [None] * len(self.caches)
        folders = [cache.folder for cache in self.caches]
        excluded = [
            _rows_of(part, folder)[0] if part else None
            for part, folder in zip(parts, folders, strict=True)
        ]
        return nothing_held_out(self.held_out, folders, excluded)

    def held_out_counts(self) -> np.ndarray:
        """int64 ``[datasets, 2]``: conversations held out, and with images of both sides."""
        return np.load(self.folder / "held-out.npy")

    def excluded(self) -> Excluded:
        """Return what the exclude lists leave out."""
        if not self.exclusions:
            return Excluded((0,) * len(self.caches), 0, ())
        found = json.loads((self.folder / "excluded.json").read_text(encoding="utf-8"))
        return Excluded(tuple(found["conversations"]), found["unknown"], tuple(found["examples"]))

    def _exclude(self) -> list[np.ndarray | None]:
        """Return bool ``[conversations]`` of each dataset, left out, or ``None`` where nothing is."""
        if not self.exclusions:
            return [None] * len(self.caches)
        masks, found = [], []
        for cache, exclusion in zip(self.caches, self.exclusions.datasets, strict=True):
            mask, there = _rows_of(exclusion, cache.folder) if exclusion else (None, exclusion)
            masks.append(mask)
            found.append(there)
        unknown = self.exclusions.unknown(found)
        content = {
            "conversations": [0 if mask is None else int(mask.sum()) for mask in masks],
            "unknown": len(unknown),
            "examples": unknown[:_EXAMPLES],
        }
        replace_text(self.folder / "excluded.json", json.dumps(content))
        return masks

    def _draw(self) -> np.ndarray:
        parts, counts = [], np.zeros((len(self.caches), 2), dtype=np.int64)
        excluded = self._exclude()
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

    def counts(self) -> np.ndarray:
        """Return int32 ``[samples, 3]``: tokens, supervised tokens, images of each sample."""
        dataset, row = self.samples[:, 0], self.samples[:, 1]
        counts = np.empty((len(self.samples), 3), dtype=np.int32)
        starts = np.searchsorted(dataset, np.arange(len(self.caches) + 1))
        for number, cache in enumerate(self.caches):
            part = slice(starts[number], starts[number + 1])
            counts[part] = cache.counts[row[part]]
        return counts

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
    """Find the conversations of a token cache that are left out; ids and image names are read, tokens not.

    Returns:
        bool ``[conversations]``, and the ids and images of the exclusion that a conversation has.
    """
    names = (pa.array(sorted(names), pa.string()) for names in (exclusion.ids, exclusion.images))
    ids, images = names
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
        before = np.concatenate([[0], np.cumsum(by_image.to_numpy(zero_copy_only=False))])
        offsets = shown.offsets.to_numpy()
        has_image = before[offsets[1:]] > before[offsets[:-1]]
        parts.append(by_id.to_numpy(zero_copy_only=False) | has_image)
    return np.concatenate(parts), Exclusion(frozenset(found_ids), frozenset(found_images))


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


@dataclass(frozen=True, slots=True)
class Sides:
    """Sides of one dataset's conversations.

    ``side``: uint8 ``[conversations]``, :data:`TRAIN`, :data:`HELD_OUT` or :data:`NEITHER`; ``order``: uint64
    ``[conversations]``, the hash by which the held-out ones are taken when not all of them are wanted.
    """

    side: np.ndarray
    order: np.ndarray

    def rows(self, side: int, *, at_most: int | None = None) -> np.ndarray:
        """Return the conversations of this side, int64, sorted; ``at_most`` those first in order."""
        rows = np.flatnonzero(self.side == side)
        if at_most is not None and len(rows) > at_most:
            rows = np.sort(rows[np.argsort(self.order[rows], kind="stable")[:at_most]])
        return rows


def sides(cache: Path, share: float) -> Sides:
    """Return the sides of a token cache's conversations.

    Args:
        cache: folder of the cache; ids and image names are read, tokens are not (about a second for a
            million conversations).
        share: of the images, between 0 and 1.
    """
    below = np.uint64(int(share * 2**64))
    side, order = [np.zeros(0, dtype=np.uint8)], [np.zeros(0, dtype=np.uint64)]
    for ids, images, offsets in _hashed_names(cache):
        held = np.concatenate([[0], np.cumsum(images < below)])
        held_count = held[offsets[1:]] - held[offsets[:-1]]
        count = np.diff(offsets)
        part = np.full(len(ids), NEITHER, dtype=np.uint8)
        part[held_count == 0] = TRAIN
        part[(held_count == count) & (count > 0)] = HELD_OUT
        text = count == 0
        part[text] = np.where(ids[text] < below, HELD_OUT, TRAIN)
        first = ids.copy()
        first[~text] = images[offsets[:-1][~text]]
        side.append(part)
        order.append(first)
    return Sides(np.concatenate(side), np.concatenate(order))


def nothing_held_out(
    share: float, caches: Sequence[Path], excluded: Sequence[np.ndarray | None]
) -> str:
    """Say of how many images a share holds none out, and the smallest share that does.

    Args:
        share: that holds nothing out.
        caches: folders of the token caches.
        excluded: bool ``[conversations]`` of each cache, what its list leaves out, or ``None``.
    """
    images, texts, least = _least_share(caches, excluded)
    of = [f"{images} image{'s'[images == 1 :]}"] if images or not texts else []
    of += [f"{texts} conversation{'s'[texts == 1 :]} without an image"] if texts else []
    return f"{share:g} of {' and '.join(of)}; hashes of the names decide, see data/plan.py. " + (
        "No share holds something out and leaves something to train on"
        if least is None
        else f"The smallest share that holds something out is {least:g}"
    )


def _least_share(
    caches: Sequence[Path], excluded: Sequence[np.ndarray | None]
) -> tuple[int, int, float | None]:
    """Count images and conversations without one; find the least share (two digits) that holds some out."""
    names = np.zeros(0, dtype=np.uint64)
    texts, first, last = 0, None, 0
    for cache, mask in zip(caches, excluded, strict=True):
        for ids, images, offsets in _hashed_names(cache, mask):
            names = np.union1d(names, images)
            count = np.diff(offsets)
            texts += int((count == 0).sum())
            owner = np.repeat(np.arange(len(ids)), count)
            low, high = ids.copy(), ids.copy()
            low[count > 0], high[count > 0] = np.uint64(2**64 - 1), np.uint64(0)
            np.minimum.at(low, owner, images)
            np.maximum.at(high, owner, images)
            if len(ids):
                first = min(int(high.min()), 2**64 if first is None else first)
                last = max(int(low.max()), last)
    if first is None:
        return 0, 0, None
    exact = (first + 1) / 2**64
    step = 10.0 ** (math.floor(math.log10(exact)) - 1)
    digits = math.ceil(exact / step)
    share = float(f"{digits * step:.2g}")
    if int(share * 2**64) <= first:  # rounding of the quotient
        share = float(f"{(digits + 1) * step:.2g}")
    return len(names), texts, share if share < 1 and last >= int(share * 2**64) else None


def _hashed_names(
    cache: Path, mask: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Hashes of the ids, of the images, and where each conversation's begin; without what is masked."""
    reader = pa.ipc.open_file(pa.memory_map(str(cache / "tokens.arrow")))
    begin = 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number).select(["id", "images"])
        if mask is not None:
            kept = ~mask[begin : begin + len(batch)]
            begin += len(batch)
            batch = batch.filter(pa.array(kept))
        images = batch.column(1)
        offsets = images.offsets.to_numpy().astype(np.int64)
        yield (
            hashes(batch.column(0)),
            hashes(images.values)[offsets[0] : offsets[-1]],
            offsets - offsets[0],
        )


def hashes(strings: pa.StringArray) -> np.ndarray:
    """Hash strings to uint64 ``[n]``: a polynomial in the UTF-8 bytes modulo 2**64, mixed.

    The same on every machine. Vectorised, because Python would take longer for 15 million names than packing
    them does. The mixing is splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).
    """
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int32)
    offsets = offsets[strings.offset : strings.offset + len(strings) + 1].astype(np.int64)
    data = strings.buffers()[2]
    text = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    text = text[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    place = np.arange(len(text)) - np.repeat(starts, lengths)
    powers = np.full(int(lengths.max(initial=0)) + 1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(text * powers[place])])
    value = sums[starts + lengths] - sums[starts] + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

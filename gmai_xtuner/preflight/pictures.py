# SPDX-License-Identifier: Apache-2.0

"""The images of a plan: which are not there, and, on demand, which can't be decoded."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from gmai_xtuner.core.archives import open_archives
from gmai_xtuner.core.constants import DATA_URL
from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import MAX_PIXELS, check_image
from gmai_xtuner.data.dataset import SoftPackedDataset

IMAGES_A_CHUNK = 16


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image, as the record gives its path, that training could not read.

    ``reason`` is ``missing_image``, ``damaged_image``, ``enormous_image`` or ``unsupported_image``.
    """

    dataset: str
    image: str
    reason: str
    problem: str


@dataclass(frozen=True, slots=True)
class _Root:
    """All distinct images below one image root, and whose they are."""

    folder: Path
    images: pa.Array
    datasets: list[tuple[str, pa.Array]]

    def owners(self, images: Sequence[str]) -> list[str]:
        """The dataset that names each image; of several, the first.

        To be asked for many at once: each call hashes all images of the datasets.
        """
        wanted = pa.array(images, pa.string())
        names = np.full(len(images), "", dtype=object)
        for name, own in reversed(self.datasets):
            names[pc.is_in(wanted, value_set=own).to_numpy(zero_copy_only=False)] = name
        return names.tolist()


def list_images(dataset: SoftPackedDataset) -> list[_Root]:
    """Return the distinct images of the token caches by image root, as Arrow arrays."""
    found: dict[Path, list[tuple[str, pa.Array]]] = {}
    for entry, cache in zip(dataset.entries, dataset.caches, strict=True):
        if entry.image_root is None:
            continue
        with pa.ipc.open_file(pa.memory_map(str(cache.folder / "tokens.arrow"))) as reader:
            batches = map(reader.get_batch, range(reader.num_record_batches))
            column = [batch.column("images").flatten() for batch in batches]
            images = pa.chunked_array(column, pa.string()).unique()
        if len(images):
            found.setdefault(entry.image_root, []).append((entry.name, images))
    return [
        _Root(folder, pa.chunked_array([images for _, images in own]).unique(), own)
        for folder, own in found.items()
    ]


def find_missing(roots: Sequence[_Root]) -> list[BadImage]:
    """Images that are not there. A folder is listed once, which spares a request for each image."""
    missing: list[BadImage] = []
    for root in roots:
        if open_archives(root.folder) is not None:
            found = _problems("exists", MAX_PIXELS, root.folder, root.images.to_pylist())
            owners = root.owners([image for image, _, _ in found])
            missing += [BadImage(name, *one) for name, one in zip(owners, found, strict=True)]
            continue
        folders: dict[str, list[str]] = {}
        for image in root.images.to_pylist():
            folders.setdefault(os.path.dirname(image), []).append(image)
        # Threads, because a network file system answers each of them late.
        with ThreadPoolExecutor(8) as pool:
            absent = pool.map(
                lambda item: _absent(root.folder / item[0], item[1]),  # noqa: B023
                folders.items(),
            )
            lost = [image for images in absent for image in images]
        missing += [
            BadImage(name, image, "missing_image", f"{str(root.folder / image)!r} is not there")
            for name, image in zip(root.owners(lost), lost, strict=True)
        ]
    return missing


def _absent(folder: Path, images: Iterable[str]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries if entry.is_file()}
    except OSError:
        present = set()
    images = (image for image in images if not image.startswith(DATA_URL))
    return [image for image in images if os.path.basename(image) not in present]


def decode_all(
    roots: Sequence[_Root], *, max_pixels: int, num_workers: int | None = None
) -> list[BadImage]:
    """Decode every image in several processes; a bar on standard error shows how far it is.

    Args:
        roots: see :func:`list_images`.
        max_pixels: an image with more is bad.
        num_workers: processes; default: the cores that this process may use.

    Returns:
        those that can't be decoded, missing ones among them, in order.
    """
    workers = num_workers or len(os.sched_getaffinity(0))
    bad: list[BadImage] = []
    total = sum(len(root.images) for root in roots)
    with tqdm(total=total, desc="Decoding", unit=" images") as progress:
        for root in roots:
            found: list[_Problem] = []
            decode = partial(_problems, "decode", max_pixels, root.folder)
            for size, problems in _in_processes(decode, root.images, workers):
                progress.update(size)
                found += problems
            owners = root.owners([image for image, _, _ in found])
            bad += [BadImage(name, *problem) for name, problem in zip(owners, found, strict=True)]
    return bad


_Problem = tuple[str, str, str]
_FORK = multiprocessing.get_context("fork")


def _in_processes(
    decode: Callable[[Sequence[str]], list[_Problem]], images: pa.Array, workers: int
) -> Iterator[tuple[int, list[_Problem]]]:
    """Yield results in order, with few chunks under way; a process that dies costs its image only."""
    starts = range(0, len(images), IMAGES_A_CHUNK)
    chunks = (images.slice(start, IMAGES_A_CHUNK).to_pylist() for start in starts)
    waiting: list[list[str]] = []
    while waiting := [*waiting, *islice(chunks, 4 * workers)]:
        try:
            with ProcessPoolExecutor(workers, mp_context=_FORK) as pool:
                under_way = [pool.submit(decode, chunk) for chunk in waiting]
                while under_way:
                    yield len(waiting[0]), under_way[0].result()
                    del waiting[0], under_way[0]
                    for chunk in islice(chunks, 1):
                        waiting.append(chunk)
                        under_way.append(pool.submit(decode, chunk))
        except BrokenProcessPool:
            # Killed for its memory, or a fault in a decoder: each image of the chunks alone.
            for chunk in waiting:
                yield len(chunk), [one for image in chunk for one in _alone(decode, image)]
            waiting = []


def _alone(decode: Callable[[Sequence[str]], list[_Problem]], image: str) -> list[_Problem]:
    try:
        with ProcessPoolExecutor(1, mp_context=_FORK) as pool:
            return pool.submit(decode, [image]).result()
    except BrokenProcessPool:
        return [(image, "damaged_image", f"{image!r}: the process that decoded it was killed")]


def _problems(level: str, max_pixels: int, folder: Path, images: Sequence[str]) -> list[_Problem]:
    problems = []
    for image in images:
        try:
            check_image(folder / image, level=level, max_pixels=max_pixels)
        except ImageError as error:
            problems.append((image, error.reason, error.problem))
    return problems

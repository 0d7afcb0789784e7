"""Conversations that a mixture leaves out by name: what an ``exclude`` list says, and which rows that is.

A list is a text file, written by hand or by ``data_tools/overlap.py``::

    # images that are in a benchmark
    image: scans/0001.png
    dataset: chest-x-rays
    id: 4711
    id: "with a quote\" and a line\\nbreak"

``id`` leaves out the conversation of that id, ``image`` every conversation with that image, named as in
the records: below the image root. What stands before the first ``dataset`` line concerns every dataset
that the list is given to, what stands behind one that dataset alone; ``dataset: *`` goes back. A value
that begins with a quotation mark is a JSON text. Blank lines and lines that begin with ``#`` say nothing.

Rows are left out when a plan draws its samples. Token caches know nothing of it, so another list makes
nothing be tokenised again, and the draw of all other conversations stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmai_xtuner.core.errors import MixtureError

KINDS = ("id", "image")
ALL = "*"
SHOWN = 20
"""Names without a conversation that are kept as examples."""


@dataclass(frozen=True, slots=True)
class Named:
    """One line of a list: ``kind`` of :data:`KINDS`, ``value``, and the ``dataset`` or None for all."""

    kind: str
    value: str
    dataset: str | None

    def __str__(self) -> str:
        return f"{self.kind}: {self.value}" + (f" ({self.dataset})" if self.dataset else "")


@dataclass(frozen=True)
class Exclusion:
    """What one dataset leaves out.

    Args:
        ids: of conversations.
        images: names below the image root.
    """

    ids: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.ids or self.images)

    @cached_property
    def digest(self) -> str:
        """Changes with what is left out, not with how it was written down."""
        content = json.dumps([sorted(self.ids), sorted(self.images)])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def rows(self, cache: Path) -> tuple[np.ndarray, Exclusion]:
        """Which conversations of a token cache are left out, and what of the list was found in it.

        Args:
            cache: folder of the cache; ids and image names are read, tokens are not.

        Returns:
            bool ``[conversations]``, and the ids and images that a conversation has.
        """
        ids, images = (pa.array(sorted(names), pa.string()) for names in (self.ids, self.images))
        found_ids: set[str] = set()
        found_images: set[str] = set()
        parts = [np.zeros(0, dtype=bool)]
        reader = pa.ipc.open_file(pa.memory_map(str(cache / "tokens.arrow")))
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            own = batch.column(batch.schema.get_field_index("id"))
            shown = batch.column(batch.schema.get_field_index("images"))
            by_id = pc.is_in(own, value_set=ids)
            by_image = pc.is_in(shown.values, value_set=images)
            found_ids.update(own.filter(by_id).to_pylist())
            found_images.update(shown.values.filter(by_image).to_pylist())
            before = np.concatenate([[0], np.cumsum(by_image.to_numpy(zero_copy_only=False))])
            offsets = shown.offsets.to_numpy()
            has_image = before[offsets[1:]] > before[offsets[:-1]]
            parts.append(by_id.to_numpy(zero_copy_only=False) | has_image)
        return np.concatenate(parts), Exclusion(frozenset(found_ids), frozenset(found_images))


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What the datasets of a stage leave out. Made by :func:`read_exclusions`.

    Args:
        datasets: one each, in their order.
        common: names that concern several datasets: known if any of them has a conversation of it.
        strangers: lines about datasets that the mixture hasn't.
    """

    datasets: tuple[Exclusion, ...]
    common: frozenset[Named] = frozenset()
    strangers: tuple[Named, ...] = ()

    def __bool__(self) -> bool:
        return bool(any(self.datasets) or self.strangers)

    @property
    def digest(self) -> str:
        """Changes with what is left out, not with how it was written down."""
        strangers = sorted(map(str, self.strangers))
        content = json.dumps([[part.digest for part in self.datasets], strangers])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def unknown(self, names: Sequence[str], found: Sequence[Exclusion]) -> list[str]:
        """Lines of the lists of which no conversation is, for people, sorted.

        Args:
            names: of the datasets.
            found: what :meth:`Exclusion.rows` found of each.
        """
        lines = {str(line) for line in self.strangers}
        anywhere = {("id", name) for part in found for name in part.ids}
        anywhere |= {("image", name) for part in found for name in part.images}
        shared = {(line.kind, line.value) for line in self.common}
        lines |= {str(line) for line in self.common if (line.kind, line.value) not in anywhere}
        for name, asked, there in zip(names, self.datasets, found, strict=True):
            for kind, missing in (
                ("id", asked.ids - there.ids),
                ("image", asked.images - there.images),
            ):
                lines |= {
                    str(Named(kind, value, name))
                    for value in missing
                    if (kind, value) not in shared
                }
        return sorted(lines)


def read_exclusions(
    lists: Sequence[Sequence[Path]], names: Sequence[str], *, known: Collection[str]
) -> Exclusions:
    """Read the lists of a stage's datasets.

    Args:
        lists: the files of each dataset.
        names: of the datasets, in the same order.
        known: names of all datasets of the mixture, also of those that the stage leaves out.

    Raises:
        MixtureError: a list can't be read, or a line isn't one of the module's.
    """
    files = {path: read_list(path) for path in dict.fromkeys(path for own in lists for path in own)}
    given_to = {path: sum(path in own for own in lists) for path in files}
    datasets, common = [], set()
    for name, own in zip(names, lists, strict=True):
        ids: set[str] = set()
        images: set[str] = set()
        for path in own:
            for line in files[path]:
                if line.dataset not in (None, name):
                    continue
                (ids if line.kind == "id" else images).add(line.value)
                if line.dataset is None and given_to[path] > 1:
                    common.add(line)
        datasets.append(Exclusion(frozenset(ids), frozenset(images)))
    strangers = dict.fromkeys(
        line
        for lines in files.values()
        for line in lines
        if line.dataset is not None and line.dataset not in known
    )
    return Exclusions(tuple(datasets), frozenset(common), tuple(strangers))


def read_list(path: Path) -> list[Named]:
    """The lines of one list.

    Raises:
        MixtureError: with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MixtureError(
            f"the exclude list {path} can't be read ({error.strerror}). Correct `exclude` in the mixture "
            "file; data_tools/overlap.py writes such a list."
        ) from error
    except UnicodeDecodeError as error:
        raise MixtureError(
            f"the exclude list {path} is not UTF-8 ({error}). Save it as UTF-8."
        ) from error
    return list(_parse(text.split("\n"), path))


def _parse(lines: Iterable[str], path: Path) -> Iterable[Named]:
    dataset: str | None = None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        value = value.strip()
        where = f"{path}, line {number}"
        if not colon or key not in ("dataset", *KINDS) or not value:
            raise MixtureError(
                f"{where}: expected 'id: ...', 'image: ...' or 'dataset: ...', got {line[:80]!r}. Each name "
                "that is left out stands on a line of its own, behind what it is."
            )
        if value.startswith('"'):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise MixtureError(
                    f"{where}: {value[:80]!r} begins with a quotation mark but is no JSON text ({error}). "
                    'Write " as \\" and put one at the end.'
                ) from error
        if key == "dataset":
            dataset = None if value == ALL else value
        else:
            yield Named(key, posixpath.normpath(value) if key == "image" else value, dataset)

"""Small sets written by tests, and what a reader makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from data_tools.samples import Dropped, Sample


def write_image(path: Path, *, width: int = 40, height: int = 30) -> Path:
    """A grey picture that is different in each place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(width * height, dtype=np.uint32).reshape(height, width) * 7 % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_mask(path: Path, values: Any, *, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette:
        image = image.convert("P")
        image.frombytes(np.asarray(values, dtype=np.uint8).tobytes())
        image.putpalette([200, 10, 10] * 256)
    image.save(path)
    return path


def options(reader: ModuleType, root: Path, **keys: Any) -> Any:
    name = reader.__name__.rsplit(".")[-1]
    return reader.Options(name="set", licence="CC0", reader=name, root=root, **keys)


def read_all(reader: ModuleType, root: Path, **keys: Any) -> tuple[list[Sample], list[Dropped]]:
    """Samples and drops of all units."""
    chosen = options(reader, root, **keys)
    found = [thing for unit in reader.units(chosen) for thing in reader.read(chosen, unit)]
    return (
        [thing for thing in found if isinstance(thing, Sample)],
        [thing for thing in found if isinstance(thing, Dropped)],
    )


def reasons(drops: list[Dropped]) -> dict[str, int]:
    return dict(Counter(drop.reason for drop in drops))


def boxes(sample: Sample) -> list[tuple[str, Any]]:
    return [(annotation.label, annotation.box) for annotation in sample.annotations]

# SPDX-License-Identifier: Apache-2.0

"""Small sets written by tests, and what a reader makes of them."""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from data_tools.preprocess import Rules
from data_tools.preprocess.clean import clean_annotations
from data_tools.records import Drop, Drops, Label, Sample


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


def read_units(reader: Any, chosen: Any) -> tuple[list[Sample], list[Drop], list[tuple[str, ...]]]:
    """Samples and drops of all units, and for each sample the labels that it lacks."""
    samples, drops, incomplete = [], [], []
    for unit in reader.units(chosen):
        of_unit = Drops()
        with of_unit.image(unit.key):
            for sample in reader.read(chosen, unit, of_unit):
                samples.append(sample)
                incomplete.append(tuple(sorted(of_unit.incomplete)))
        drops += of_unit.found
    return samples, drops, incomplete


def read_all(reader: ModuleType, root: Path, **keys: Any) -> tuple[list[Sample], list[Drop]]:
    """Samples and drops of all units."""
    samples, drops, _ = read_units(reader, options(reader, root, **keys))
    return samples, drops


def incomplete(reader: ModuleType, root: Path, **keys: Any) -> list[tuple[str, ...]]:
    """For each sample the labels that it lacks."""
    return read_units(reader, options(reader, root, **keys))[2]


def regions_of(
    sample: Sample, size: tuple[int, int], rules: str = "none"
) -> tuple[list[Label], list[str]]:
    """Regions of a sample, and the reasons for those that the rules drop."""
    drops = Drops()
    chosen = Rules.model_validate(rules)
    found = clean_annotations(sample.annotations, size=size, rules=chosen, drops=drops, where="")
    return found, [drop.reason for drop in drops.found]


def reasons(drops: list[Drop]) -> dict[str, int]:
    return dict(Counter(drop.reason for drop in drops))


def boxes(sample: Sample) -> list[tuple[str, Any]]:
    return [(annotation.label, annotation.box) for annotation in sample.annotations]

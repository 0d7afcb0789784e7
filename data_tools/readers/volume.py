"""Volumes with label maps: NIfTI, NRRD and MetaImage, one of them paired with the other by patterns.

    images: "{case}/ct.nii.gz"
    masks: "{case}/segmentation.nii.gz"            # the value is the label's code
    masks: "{case}/segmentations/{label}.nii.gz"   # or a binary file for each label, as TotalSegmentator has

The volume is turned to RAS+, cleaned by the three-dimensional rules, and cut into pictures. A label map must
lie on the volume's grid: another shape, or corners more than a tenth of a voxel away, drop the case.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.volumes import Structure, Volume, pack, structures_of
from data_tools.readers.files import file_below, fitting, matching, place_names
from data_tools.readers.volume_samples import Origin, VolumeOptions, samples
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.volumes import SUFFIXES, Grid, load, load_labels, same_grid

OTHER_GRID = "mask on another grid than its volume"


class Options(VolumeOptions):
    """Keys of ``reader: volume``.

    Args:
        images: pattern of the volumes' paths. ``{name}`` holds no ``/``, ``{name:path}`` may; ``{group}``
            is the patient; ``{label}`` is said of the volume's pictures as a whole.
        masks: pattern or patterns of the label maps' paths, with the volume's pieces. With ``{label}`` a
            file is one structure, whatever its values are; without it the value is the label's code.
        channel: index along the fourth axis (time, sequence). A volume of four axes without it is dropped.
    """

    reader: Literal["volume"]
    images: str
    masks: str | tuple[str, ...] = ()
    channel: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _patterns(self) -> Options:
        for template in (self.images, *self.templates):
            if template.startswith("/") or ".." in template.split("/"):
                raise ValueError(f"the pattern {template!r} leads out of the root")
            if not template.lower().endswith((*SUFFIXES, "}")):
                raise ValueError(f"the pattern {template!r} ends in none of {', '.join(SUFFIXES)}")
        return self

    @property
    def templates(self) -> tuple[str, ...]:
        """The patterns of label maps."""
        return (self.masks,) if isinstance(self.masks, str) else self.masks


def units(options: Options) -> Iterator[Unit]:
    """A unit for each volume: its path and those of its label maps.

    Raises:
        SourceError: no file fits ``images``.
    """
    images = fitting(options.root, options.images, options.templates, source=options.name)
    for name, places in images:
        known = {key: text for key, text in places.items() if key != "label"}
        masks = [
            [path, texts.get("label", "") if "label" in place_names(template) else ""]
            for template in options.templates
            for path, texts in matching(options.root, template, known)
        ]
        group, label = places.get("group"), places.get("label")
        yield Unit(name, {"masks": masks, "group": group, "label": label})


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the slices of one volume."""
    if options.templates and not unit.payload["masks"]:
        raise Unusable("image without a mask")
    path = file_below(options.root, unit.key)
    grid = load(path, channel=options.channel, max_voxels=options.max_voxels)
    volume = _labelled(options, grid, unit.payload["masks"])
    label = unit.payload["label"]
    origin = Origin(
        unit.key,
        part={} if options.channel is None else {"channel": options.channel},
        group=unit.payload["group"],
        preprocessing=grid.notes,
        whole=(Annotation(label),) if label else (),
    )
    yield from samples(volume, origin, options, drops)


def map_on(grid: Grid, path: Path, name: str, *, max_voxels: int) -> np.ndarray:
    """A label map on the volume's grid.

    Raises:
        Unusable: it can't be read, or lies on another grid.
    """
    try:
        labels = load_labels(path, max_voxels=max_voxels)
    except Unusable as bad:
        raise Unusable(bad.reason.replace("volume", "mask", 1), f"{name}: {bad.detail}") from bad
    difference = same_grid(labels.array.shape, labels.affine, grid.array.shape, grid.affine)
    if difference:
        raise Unusable(OTHER_GRID, f"{name}: {difference}")
    return labels.array


def _labelled(options: Options, grid: Grid, masks: list[list[str]]) -> Volume:
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    binary: list[tuple[str, np.ndarray, dict[str, str]]] = []
    for name, label in masks:
        path = file_below(options.root, name)
        values = map_on(grid, path, name, max_voxels=options.max_voxels)
        if label:
            binary.append((label, values > 0, {}))
        else:
            structures += structures_of(values, len(layers))
            layers.append(values)
    packed, named = pack(binary, grid.array.shape)
    structures += [
        Structure(item.label, item.layer + len(layers), item.value, item.attributes)
        for item in named
    ]
    if masks and not structures:
        raise Unusable("empty label map", f"{len(masks)} files")
    return Volume(grid.array, grid.affine, (*layers, *packed), tuple(structures))

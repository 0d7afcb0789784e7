# SPDX-License-Identifier: Apache-2.0

"""Volumes with label maps: NIfTI, NRRD and MetaImage, one of them paired with the other by patterns.

    images: "{case}/ct.nii.gz"
    masks: "{case}/segmentation.nii.gz"            # the value is the label's code
    masks: "{case}/segmentations/{label}.nii.gz"   # or a binary file for each label, as TotalSegmentator has

The volume is turned to RAS+, cleaned by the three-dimensional rules, and cut into images. A label map must
lie on the volume's grid, or be cut out of it; corners more than a tenth of a voxel away drop the case. Of a
segmentation by 3D Slicer the segments' names are the labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.volumes import Structure, Volume, pack, structures_of
from data_tools.readers.files import file_below
from data_tools.readers.patterns import Places, paired
from data_tools.readers.volume_samples import Origin, VolumeOptions, samples
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.slicing import AXES
from gmai_xtuner.core.imaging.volumes import SUFFIXES, Grid, LabelMap, load, load_labels, on_grid

PART = "label map of a part of its volume: what lies outside of it isn't known"


class Options(VolumeOptions):
    """Keys of ``reader: volume``.

    Args:
        images: pattern of the volumes' paths. ``{name}`` holds no ``/``, ``{name:path}`` may; ``{group}``
            is the patient; ``{label}`` is said of the volume's images as a whole.
        masks: pattern or patterns of the label maps' paths, with the volume's pieces. With ``{label}`` a
            file is one structure, whatever its values are; without it the value is the label's code.
        channel: index along the fourth axis (time, sequence), of volume and label map. A volume of four axes
            without it is dropped.
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
    """Yield a unit for each volume, with the places of its path and those of its label maps.

    Raises:
        SourceError: no file fits ``images``, or one can be read in two ways.
    """
    labels = None if options.labels is None else set(options.labels)
    for found in paired(options, options.images, options.templates, labels=labels):
        yield Unit(found.path, (found.places, found.masks))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the slices of one volume."""
    places, masks = unit.payload
    if options.templates and not masks:
        raise Unusable("image without a mask")
    grid = load(
        file_below(options, unit.key),
        channel=options.channel,
        max_voxels=options.max_voxels,
        within=options.roots,
    )
    volume, notes = _labelled(options, grid, masks, drops)
    if grid.flat:  # one image, whichever way it lies
        axis = AXES[grid.array.shape.index(1)]
        slicing = options.slices.model_copy(update={"axes": (axis,)})
        options = options.model_copy(update={"slices": slicing})
    label = places.get("label")
    origin = Origin(
        unit.key,
        part={} if options.channel is None else {"channel": options.channel},
        group=places.get("group"),
        preprocessing=grid.notes | notes,
        whole=(Annotation(label),) if label else (),
        examined=_examined(volume, masks),
    )
    yield from samples(volume, origin, options, drops)


def _examined(volume: Volume, masks: list[tuple[str, Places]]) -> tuple[str, ...]:
    """Return the labels that somebody looked for in all of the volume; an empty file stands for none."""
    named = {places["label"] for _, places in masks if places.get("label")}
    found = {item.label for item in volume.structures} | named
    return tuple(sorted(found))


def maps_on(
    grid: Grid, options: VolumeOptions, name: str, drops: Drops, *, channel: int | None = None
) -> LabelMap:
    """Return the label maps of a file on the volume's grid.

    A map that was cut out of the volume says nothing of the rest, unless 3D Slicer cut it.

    Raises:
        Unusable: it can't be read, or lies on another grid.
    """
    path = file_below(options, name, "no such mask file")
    limits: dict[str, Any] = {"max_voxels": options.max_voxels, "within": options.roots}
    try:
        found = load_labels(path, channel=channel, channels=grid.channels, **limits)
        layers = tuple(on_grid(layer, found.affine, grid) for layer in found.layers)
    except Unusable as bad:
        reason = "mask" + bad.reason.removeprefix("volume")
        shown = reason if bad.reason.startswith("volume") else bad.reason
        raise Unusable(shown, f"{name}: {bad.detail}") from bad
    if layers[0].shape != found.layers[0].shape and not found.segments:
        lost = [item.label for layer in layers for item in structures_of(layer)]
        drops.add(PART, name, lost=lost)
    return replace(found, layers=layers)


def _labelled(
    options: Options, grid: Grid, masks: list[tuple[str, Places]], drops: Drops
) -> tuple[Volume, dict[str, str]]:
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    binary: list[tuple[str, np.ndarray, dict[str, str]]] = []
    notes: dict[str, str] = {}
    for name, places in masks:
        label = places.get("label")
        found = maps_on(grid, options, name, drops, channel=options.channel)
        notes |= found.notes
        if label:
            binary.append((label, np.any([layer > 0 for layer in found.layers], axis=0), {}))
            continue
        for number, layer in enumerate(found.layers):
            names = {item.value: item.name for item in found.segments if item.layer == number}
            for item in structures_of(layer, len(layers)):
                structures.append(replace(item, label=names.get(item.value, item.label)))
            layers.append(layer)
    packed, of_binary = pack(binary, grid.array.shape)
    structures += [replace(item, layer=item.layer + len(layers)) for item in of_binary]
    if masks and not structures:
        raise Unusable("empty label map", f"{len(masks)} files")
    return Volume(grid.array, grid.affine, (*layers, *packed), tuple(structures)), notes

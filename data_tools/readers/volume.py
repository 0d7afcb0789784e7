# SPDX-License-Identifier: Apache-2.0

"""Volumes with label maps: NIfTI, NRRD and MetaImage, one of them paired with the other by patterns.

The volume is turned to RAS+, cleaned by the three-dimensional rules, and cut into images. A label map must
lie on the volume's grid, or be cut out of it; corners more than a tenth of a voxel away drop the case.
`VolumeOptions`, `labelled`, `maps_on` and `samples` serve the other readers of volumes too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from data_tools.options import Options as Section
from data_tools.preprocess.clean import clean_volume
from data_tools.preprocess.volumes import Slicing, Structure, Volume, pack, slices, structures_of
from data_tools.readers import SourceOptions
from data_tools.readers.files import UNKNOWN, file_below, listed
from data_tools.readers.patterns import Patterns, Places, check_templates, paired
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging import volumes, windows
from gmai_xtuner.core.imaging.volume_headers import SUFFIXES
from gmai_xtuner.core.imaging.volumes import AXES, PLANES, Axis, Grid, LabelMap
from gmai_xtuner.core.imaging.windows import IntensityWindow

PART = "label map of a part of its volume: what lies outside of it isn't known"
FLAWED_CUT = "uneven or tilted series cut across its slices"
UNCLEAR = "slice with voxels marked as ignored"
EMPTY = "empty label map"
NO_PIXELS = np.zeros((0, 0), dtype=np.uint8)
"""Image of a sample that tells what all images of a volume have in common."""


class LevelAndWidth(Section):
    """``{level: 40, width: 400}`` shows -160 to 240."""

    level: float
    width: float = Field(gt=0)


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"a window runs from low to high, not from {ends[0]} to {ends[1]}")
    return ends


Window = (
    Literal["auto", "slice", "volume", "percentile", "soft tissue", "lung", "brain", "bone"]
    | Literal["biomedparse abdomen", "biomedparse lung", "biomedparse pelvis"]
    | Literal["biomedparse liver", "biomedparse colon", "biomedparse pancreas"]
    | LevelAndWidth
    | Annotated[tuple[float, float], AfterValidator(_ordered)]
)
FileWindow = Literal["file"] | Window
"""As `Window`; ``file`` is the file's own VOI LUT or window, without one ``auto``."""


class VolumeOptions(SourceOptions):
    """Keys of every reader of volumes; see `preprocess.volumes.Slicing` and `core.imaging.windows`.

    A file that declares more than ``max_voxels``, by default 4 GiB of float32, is dropped before it is read.
    """

    default_source_task: ClassVar[str] = "3D segmentation"

    slices: Slicing = Slicing()
    window: Window = "auto"
    max_voxels: int = Field(2**30, ge=1)


class Options(VolumeOptions):
    """Keys of ``reader: volume``; docs/corpus.md explains them."""

    images: str
    masks: Patterns = ()
    channel: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _patterns(self) -> Options:
        check_templates(self.images, *self.masks, suffixes=SUFFIXES)
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each volume, with the places of its path and those of its label maps."""
    for found in paired(options, options.images, options.masks):
        yield Unit(found.path, (found.places, found.masks))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the slices of one volume."""
    places, masks = unit.payload
    if options.masks and not masks:
        raise Unusable("image without a mask")
    limits: dict[str, Any] = {"max_voxels": options.max_voxels, "within": options.roots}
    grid = volumes.load(file_below(options, unit.key), channel=options.channel, **limits)
    volume, notes = labelled(grid, options, masks, drops, channel=options.channel)
    label = places.get("label")
    origin = Sample(
        NO_PIXELS,
        unit.key,
        (Annotation(label),) if label else (),
        part={} if options.channel is None else {"channel": options.channel},
        group=places.get("group"),
        preprocessing=grid.notes | notes,
        examined=examined_in(volume, masks),
    )
    # A flat file is one image, whichever way it lies: its plane isn't known.
    axis = AXES[grid.array.shape.index(1)] if grid.flat else None
    for sample in samples(volume, origin, options, drops, axis=axis):
        done = {k: text for k, text in sample.preprocessing.items() if k != "orientation"}
        flat = replace(sample, part=origin.part, preprocessing=done)
        yield flat if grid.flat else sample


def maps_on(
    grid: Grid,
    options: VolumeOptions,
    name: str,
    drops: Drops,
    *,
    channel: int | None = None,
    labels: Iterable[str] = (),
) -> LabelMap:
    """Return the label maps of a file on the volume's grid, or raise `Unusable`.

    A map that was cut out of the volume says nothing of the rest, unless 3D Slicer cut it: its ``labels`` (by
    default the values in it) are lost. ``channel`` is the one that was taken of the volume.
    """
    path = file_below(options, name, "no such mask file")
    limits: dict[str, Any] = {"max_voxels": options.max_voxels, "within": options.roots}
    try:
        found = volumes.load_labels(path, channel=channel, channels=grid.channels, **limits)
        layers = tuple(volumes.on_grid(layer, found.affine, grid) for layer in found.layers)
    except Unusable as bad:
        reason = "mask" + bad.reason.removeprefix("volume")
        shown = reason if bad.reason.startswith("volume") else bad.reason
        raise Unusable(shown, f"{name}: {bad.detail}") from bad
    if layers[0].shape != found.layers[0].shape and not found.segments:
        values = [item.label for layer in layers for item in structures_of(layer)]
        drops.add(PART, name, lost=tuple(labels) or values)
    return replace(found, layers=layers)


def labelled(
    grid: Grid,
    options: VolumeOptions,
    masks: list[tuple[str, Places]],
    drops: Drops,
    *,
    channel: int | None = None,
) -> tuple[Volume, dict[str, str]]:
    """Return the volume with the label maps of files, and notes on these; `Unusable` if all are empty."""
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    binary: list[tuple[str, np.ndarray, dict[str, str]]] = []
    notes: dict[str, str] = {}
    for name, places in masks:
        label = places.get("label")
        named = [label] if label else []
        found = maps_on(grid, options, name, drops, channel=channel, labels=named)
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
        raise Unusable(EMPTY, f"{len(masks)} files")
    return Volume(grid.array, grid.affine, (*layers, *packed), tuple(structures)), notes


def examined_in(volume: Volume, masks: list[tuple[str, Places]]) -> tuple[str, ...]:
    """Return the labels that somebody looked for in all of a volume; an empty file stands for none."""
    named = {texts["label"] for _, texts in masks if texts.get("label")}
    return tuple(sorted(named | {item.label for item in volume.structures}))


def window_for(window: Window, voxels: np.ndarray, *, modality: str | None) -> IntensityWindow:
    """Return the intensity window that a job's ``window`` means, see `windows.window_for`."""
    if isinstance(window, LevelAndWidth):
        return windows.window_for(
            windows.Window(window.level, window.width), voxels, modality=modality
        )
    return windows.window_for(window, voxels, modality=modality)


def where_of(origin: Sample) -> str:
    """Return the file and the part of it that a sample is, for drops."""
    return "#".join([origin.source_file, *map(str, origin.part.values())])


def image_of(
    origin: Sample,
    image: np.ndarray,
    done: Mapping[str, str],
    annotations: tuple[Annotation, ...],
    **part: int | str,
) -> Sample:
    """Return one uint8 image's sample, with what was done, its annotations and its part beside ``origin``'s.

    Without ``origin.examined`` a label is known where an image holds it, and nowhere else.
    """
    return replace(
        origin,
        image=image,
        annotations=origin.annotations + annotations,
        part={**origin.part, **part},
        preprocessing={**origin.preprocessing, **done},
        examined=origin.examined or tuple(item.label for item in annotations),
    )


def samples(
    volume: Volume,
    origin: Sample,
    options: VolumeOptions,
    drops: Drops,
    *,
    window: IntensityWindow | None = None,
    axis: Axis | None = None,
) -> Iterator[Sample]:
    """Yield the volume's slices after the three-dimensional rules; one image in memory at a time.

    ``origin`` has what all have in common; its annotations are said of each image as a whole. Which slices a
    component that is left out reaches isn't known: its label is lost in all of them. ``window`` goes
    before ``options.window``; along another ``axis`` than this it may not be cut.
    """
    rules, where = options.clean, where_of(origin)
    with drops.image(where):
        if volume.layers and not volume.structures:
            raise Unusable(EMPTY)
        volume = _known(volume, options, drops, where)
        cleaned = clean_volume(volume, rules, drops=drops, where=where)
        if volume.structures and not cleaned.structures:
            return
        axes = options.slices.axes if axis is None else (axis,)
        upright = [each for each in axes if not volumes.is_sheared(volume.affine, each)]
        if not upright:
            raise Unusable(FLAWED_CUT, f"no right angles; see `slices.axes`, {', '.join(axes)}")
        modality = options.modality or origin.modality
        window = window or window_for(options.window, cleaned.voxels, modality=modality)
        for cut in slices(cleaned, window, options.slices, upright):
            with drops.image(f"{where}#{cut.axis}{cut.index}"):
                height, width = cut.image.shape
                if cut.unclear:
                    raise Unusable(UNCLEAR)
                if min(height, width) < rules.min_edge_ratio * max(height, width):
                    reason = "slice with a short edge under"
                    reason += f" {rules.min_edge_ratio:g} of the long one"
                    raise Unusable(reason, f"{width} x {height}")
                done = {"window": window.text, "orientation": f"{PLANES[cut.axis]}, from RAS+"}
                if cut.stretched is not None:
                    done["pixels"] = f"square, {cut.stretched:g} mm"
                part = {"axis": cut.axis, "slice": cut.index}
                yield image_of(origin, cut.image, done, cut.annotations, **part)


def _known(volume: Volume, options: VolumeOptions, drops: Drops, where: str) -> Volume:
    """Return the volume with those structures that the job's ``labels`` know, if it has any."""
    names = {label.strip() for label in options.labels or {}}
    known = tuple(item for item in volume.structures if item.label.strip() in names)
    if options.labels is None or len(known) == len(volume.structures):
        return volume
    unknown = [item.label for item in volume.structures if item not in known]
    detail = f"{listed(unknown, at_most=200)} not in the job's `labels`"
    if not known:
        raise Unusable(UNKNOWN, detail)
    drops.add(UNKNOWN, where, detail, lost=unknown)
    return replace(volume, structures=known)

# SPDX-License-Identifier: Apache-2.0

"""DICOM: single images, cine loops, series as volumes, labelled by a table, SEG, RTSTRUCT or label maps.

A series whose files are slices becomes a volume, which is cut into images as NIfTI is; every other file
gives one image a frame. Segmentations are found by the series or images that they refer to. Other images of
the study, and those that a segmentation doesn't fit, are incomplete for its labels. Label maps in other
formats (NRRD, NIfTI) are found by patterns, and must lie on the grid of their series.

Nothing of a header that says who the patient is leaves this reader but the name of the group, which
`data_tools.privacy` hides as it does the path: see `dicom_headers` for what does.
"""

from __future__ import annotations

import contextlib
import fnmatch
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.burned_in import BURNED_IN
from data_tools.preprocess.volumes import Volume, pack
from data_tools.privacy import suffix
from data_tools.readers import dicom_headers, patterns, volume
from data_tools.readers.dicom_drawn import Mask, labels_of, masks_of, open_drawn
from data_tools.readers.dicom_headers import ATTRIBUTES, attributes_of, modality_of, read_header
from data_tools.readers.file_rows import FileRow, RowColumns, read_rows
from data_tools.readers.files import files, folder_of, table_of
from data_tools.readers.patterns import Patterns, Places, check_templates, place_names
from data_tools.readers.volume import FLAWED_CUT, FileWindow, VolumeOptions
from data_tools.records import ANYTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging import dicom, dicom_pixels
from gmai_xtuner.core.imaging.dicom_pixels import photometric_of
from gmai_xtuner.core.imaging.volume_headers import LPS_TO_RAS, SUFFIXES
from gmai_xtuner.core.imaging.volumes import OFF_GRID, OTHER_GRID, TOO_LARGE, Grid, to_ras
from gmai_xtuner.core.imaging.windows import IntensityWindow

ORPHAN = "segmentation without its series"
ELSEWHERE = "segmentation of other images of the study"
NOT_WANTED = "segmentation that the job leaves out"
COPY = "copy of a file of the same series"
BOX_OF_SERIES = "box of the table for a whole series"
COLOURED = "series of colour pictures"
NO_MAP = "series without its label map"
MAP_OF_SEVERAL = "label map of several series on one grid"
Key = Literal["file", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]
_OF_AN_IMAGE = ("file", "SOPInstanceUID")
_OF_A_SERIES = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID")


class Options(VolumeOptions):
    """Keys of ``reader: dicom``; docs/corpus.md explains them."""

    default_source_task = "2D classification"
    names_patients = True

    files: str = "*"
    table: str | None = None
    columns: RowColumns = RowColumns()
    match: Key = "file"
    label: Literal["folder"] | None = None
    volumes: bool = True
    segmentations: bool = True
    series: str = "{case:path}"
    masks: Patterns = ()
    window: FileWindow = "file"  # type: ignore[assignment]
    voi: int | str = 0
    every: int = Field(1, ge=1)
    at_most: int | None = Field(None, ge=1)
    keep: tuple[dicom_headers.Attribute, ...] = ATTRIBUTES
    burned_in: Literal["drop", "keep"] = "drop"

    @model_validator(mode="after")
    def _patterns(self) -> Options:
        check_templates(self.series)
        check_templates(*self.masks, suffixes=SUFFIXES)
        known = {"label", *place_names(self.series), *_OF_A_SERIES}
        if unknown := {name for each in self.masks for name in place_names(each)} - known:
            expected = f"those of `series`, UIDs and `label` are known: {sorted(known)}"
            raise ValueError(f"names in `masks` without a meaning: {sorted(unknown)}; {expected}")
        if self.masks and not self.volumes:
            raise ValueError("`masks` lie on volumes: expected `volumes: true`")
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each series of slices, and for every other file; files that can't be used as well.

    Only headers are read. They are held meanwhile, about a kilobyte a file.
    """
    folder_of(options, "", key="root")
    rows: dict[str, list[FileRow]] = {}
    if options.table is not None:
        rows = read_rows(options.name, table_of(options, options.table), options.columns)
    key = attrgetter(_FIELDS[options.match])
    headers: list[dicom.Header] = []
    bad: list[tuple[str, Unusable]] = []
    for name in files(options):
        if not fnmatch.fnmatch(name, options.files):
            continue
        try:
            header = read_header(options.root / name, name)
            headers += [header] if header.sop_class != dicom_headers.DIRECTORY else []
        except Unusable as error:
            bad.append((name, error))

    def dropped(path: str, reason: str, detail: str = "") -> Unit:
        return Unit(path, {"drop": (reason, detail)})

    segmentations, images = [], []
    for header in headers:
        if header.sop_class in (*dicom_headers.SEGMENTATION, dicom_headers.STRUCTURE_SET):
            segmentations.append(header)
        elif header.sop_class == dicom_headers.WHOLE_SLIDE:
            yield dropped(header.path, "whole-slide image", "read it with `reader: slide`")
        elif header.modality in dicom.NO_PICTURES:
            yield dropped(header.path, dicom.NO_PICTURE, header.modality)
        else:
            images.append(header)
    stacks = list(dicom_headers.groups(images))
    owners = defaultdict[str, list[list[dicom.Header]]](list)
    for members in stacks:
        for path, _ in _maps_of(options, members[0]):
            owners[path].append(members)
    for name, fault in bad:
        if name in owners:
            continue
        reason = fault.reason
        if reason == dicom.NOT_DICOM:
            reason = f"{dicom.NOT_DICOM} ({suffix(name) or 'of another kind'})"
        yield dropped(name, reason, fault.detail)
    if options.match == "file":
        stated, rows = rows, {}
        for name, of in stated.items():
            rows.setdefault(posixpath.normpath(name.replace("\\", "/")), []).extend(of)
    of_images = {key(header) for header in images}
    for name in (name for name in rows if name not in of_images):
        yield dropped(name, "row of the table without an image", f"line {rows[name][0].line}")
    of_series = defaultdict[str, set[str]](set)
    for header in images:
        of_series[header.series].add(header.instance)
    drawn, of_study = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for header in segmentations:
        of_study[header.study or header.patient].append(header.path)
        found = dicom_headers.targets(header, images, options.root) if options.segmentations else []
        for uid in found:
            drawn[uid].append(header.path)
        if not options.segmentations:
            yield dropped(header.path, NOT_WANTED)
        elif not found:
            detail = "what it was drawn on is not below the root, or it doesn't say"
            yield dropped(header.path, ORPHAN, detail)
    for members in stacks:
        maps = _maps_of(options, members[0])
        rivals = {path: [one for one in owners[path] if one is not members] for path, _ in maps}
        shared = [path for path in rivals if any(_may_lie_on(members, one) for one in rivals[path])]
        # A table of images says nothing of their neighbours: their series isn't taken as one.
        named = any(key(header) in rows for header in members)
        one_by_one = named and options.match in _OF_AN_IMAGE
        own = drawn[members[0].series]
        study = members[0].study or members[0].patient
        elsewhere = [path for path in of_study[study] if study and path not in own]
        whole = options.volumes and not one_by_one and dicom.is_stack(members)
        if whole:
            again = dicom_headers.copies(members, options.root)
            yield from (dropped(header.path, COPY) for header in again)
            members = [header for header in members if header not in again]
        for part in [members] if whole else [[member] for member in members]:
            first = part[0]
            person = first.patient or first.study or first.series or first.path
            labels = [row for header in part for row in rows.get(key(header), ())]
            others = of_series[first.series] - {h.instance for h in part} if whole else ()
            payload = {
                "paths": tuple(header.path for header in part),
                "drawn": tuple(own),
                "elsewhere": tuple(elsewhere),
                "masks": maps,
                "shared": shared,
                "siblings": tuple(sorted(others)),
                "rows": tuple(dict.fromkeys((r.label, r.box) for r in labels if not r.problem)),
                "problems": tuple((row.lost, row.problem) for row in labels if row.problem),
                "group": person,
            }
            yield Unit(first.path, payload)


def _maps_of(options: Options, header: dicom.Header) -> list[tuple[str, Places]]:
    """Return the label maps of a series: patterns know its UIDs, the patient, and its folder's pieces."""
    if not options.masks:
        return []
    folder = posixpath.dirname(header.path)
    readings = patterns.pattern(options.series).readings(folder)
    known = patterns.one_reading(readings, None, path=folder, key="series", source=options.name)
    found = (known or {}) | {
        key: text for key in _OF_A_SERIES if (text := getattr(header, _FIELDS[key]))
    }
    told = [one for one in options.masks if {*place_names(one)} <= {"label", *found}]
    return patterns.masks_of(options, told, found)


def _may_lie_on(one: Sequence[dicom.Header], other: Sequence[dicom.Header]) -> bool:
    """Return whether two series may have one grid; that of an enhanced file isn't known from its header."""
    if any(each[0].sop_class in dicom_headers.ENHANCED for each in (one, other)):
        return True
    places = ({tuple(np.round(h.position, 1)) for h in each if h.position} for each in (one, other))
    return not next(places).isdisjoint(next(places))


_FIELDS = dict(zip(get_args(Key), ("path", "study", "series", "instance", "patient"), strict=True))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the images of a file or of a series."""
    if "drop" in unit.payload:
        raise Unusable(*unit.payload["drop"])
    with dicom.damage_as(dicom.DAMAGED):
        images = _opened(options, unit, drops)
        sop_class = str(images.data.get("SOPClassUID", ""))
        enhanced = sop_class in dicom_headers.ENHANCED and dicom.is_stack(images.planes)
        is_volume = len(unit.payload["paths"]) > 1 or (options.volumes and enhanced)
        yield from images.of_volume() if is_volume else images.of_frames()


def read_picture(path: Path, *, source_file: str) -> Sample:
    """Return the image of a DICOM file of one frame, without annotations, for tables of labels."""
    with dicom.damage_as(dicom.DAMAGED):
        data = dicom.open_dataset(path)
        if str(data.get("Modality", "")) in dicom.NO_PICTURES:
            raise Unusable(dicom.NO_PICTURE, str(data.Modality))
        if (count := len(dicom.frame_headers(data))) > 1:
            detail = f"{count} frames; the reader dicom takes them"
            raise Unusable("DICOM file of several frames", detail)
        _refuse_burned_in(data)
        pixels, text = _image(data, 0, window="file", voi=0)
        return Sample(
            pixels,
            source_file,
            modality=modality_of(data),
            attributes=attributes_of(data, ATTRIBUTES),
            preprocessing={"window": text},
        )


def _refuse_burned_in(data: Any) -> None:
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise Unusable(BURNED_IN)


def _image(data: Any, frame: int, *, window: FileWindow, voi: int | str) -> tuple[np.ndarray, str]:
    """Return uint8 ``[H, W]`` or ``[H, W, 3]`` of a frame, and the text for ``Sample.preprocessing``."""
    if photometric_of(data) in dicom_pixels.COLOUR:
        return dicom_pixels.colours(data, frame)
    values = dicom_pixels.intensities(data, frame)
    shown = _window_of(data, values, frame, window=window, voi=voi)
    return shown.apply(values), shown.text


def _window_of(
    data: Any, values: np.ndarray, frame: int, *, window: FileWindow, voi: int | str
) -> IntensityWindow:
    """Return what a job's ``window`` means for a grey image; ``file`` without one is ``auto``."""
    own = dicom_pixels.file_intensity_window(data, frame, voi) if window == "file" else None
    chosen = "auto" if window == "file" else window
    found = own or volume.window_for(chosen, values, modality=modality_of(data))
    white_is_low = photometric_of(data) == "MONOCHROME1"
    return found.inverted("MONOCHROME1 turned round") if white_is_low else found


@dataclass(frozen=True, slots=True)
class _Images:
    """The images of one unit: a header for each (``planes``), and what all have in common (``origin``)."""

    options: Options
    payload: Mapping[str, Any]
    data: Any
    planes: Sequence[dicom.Header]
    origin: Sample
    drops: Drops

    def of_frames(self) -> Iterator[Sample]:
        """Yield an image for each frame, with what was drawn into it."""
        options, planes, count = self.options, self.planes, len(self.planes)
        taken = np.arange(0, count, options.every)
        if options.at_most is not None and len(taken) > options.at_most:
            taken = taken[np.linspace(0, len(taken) - 1, options.at_most).round().astype(int)]
        stack = None
        if planes[0].position and planes[0].orientation and (count == 1 or dicom.is_stack(planes)):
            with contextlib.suppress(Unusable):  # frames without a place may be referred to
                stack = dicom.stack_of(planes)
        masks = self._drawn(stack)
        if self.options.masks:
            self.drops.add(NO_MAP, self.origin.source_file, "images that are no volume")
        of_frame = {frame: at for at, frame in enumerate(stack.order if stack else range(count))}
        edge, name = options.clean.min_edge_ratio, self.origin.source_file
        for frame in taken.tolist():
            with self.drops.image(name if count == 1 else f"{name}#{frame}"):
                pixels, text = _image(self.data, frame, window=options.window, voi=options.voi)
                height, width = pixels.shape[:2]
                if count > 1 and min(height, width) < edge * max(height, width):
                    raise Unusable("frame with a short edge", f"{width} x {height}")
                held = ((label, mask[of_frame[frame]]) for label, mask in masks)
                regions = tuple(Annotation(label, mask=mask) for label, mask in held if mask.any())
                part = {} if count == 1 else {"frame": frame}
                yield volume.image_of(self.origin, pixels, {"window": text}, regions, **part)

    def of_volume(self) -> Iterator[Sample]:
        """Yield the images that are cut out of slices one behind the other."""
        siblings = frozenset(self.payload["siblings"])
        stack = replace(dicom.stack_of(self.planes), siblings=siblings)
        origin, axis = self.origin, None
        array, window = self._voxels(stack)
        if stack.flaw:
            if (axis := stack.axis) not in self.options.slices.axes:
                detail = f"{stack.flaw}; its slices lie along {axis}, see `slices.axes`"
                raise Unusable(FLAWED_CUT, detail)
            notes = {**origin.preprocessing, "slices": stack.flaw}
            origin = replace(origin, preprocessing=notes)
        affine, nothing = LPS_TO_RAS @ stack.affine, dict[str, str]()
        turned = [(label, to_ras(mask, affine)[0], nothing) for label, mask in self._drawn(stack)]
        voxels, turned_affine = to_ras(array, affine)
        made = Volume(voxels, turned_affine, *pack(turned, voxels.shape))
        if self.options.masks:
            made, origin = self._mapped(made, origin, stack)
        yield from volume.samples(made, origin, self.options, self.drops, window=window, axis=axis)

    def _mapped(self, drawn: Volume, origin: Sample, stack: dicom.Stack) -> tuple[Volume, Sample]:
        """Return the volume with the label maps of the series too; all are lost if one doesn't fit."""
        masks = self.payload["masks"]
        where, grid = volume.where_of(origin), Grid(drawn.voxels, drawn.affine)
        try:
            if not masks:
                raise Unusable(NO_MAP)
            if self.payload["shared"]:
                raise Unusable(MAP_OF_SEVERAL, "say in `series` which of them it was drawn on")
            even = np.linspace(stack.heights[0], stack.heights[-1], len(stack.planes))
            off = np.abs(stack.heights - even).max() / (even[1] - even[0])
            if stack.flaw or off > OFF_GRID:
                detail = f"{stack.flaw or 'uneven distances'}, up to {off:.2f} slices"
                raise Unusable(OTHER_GRID, f"a map of even slices on {detail}")
            mapped, notes = volume.labelled(grid, self.options, masks, self.drops)
        except Unusable as error:
            if not (origin.annotations or drawn.structures):
                raise
            self.drops.add(error.reason, where, error.detail)
            return drawn, origin
        first = len(drawn.layers)
        added = (replace(item, layer=item.layer + first) for item in mapped.structures)
        structures = (*drawn.structures, *added)
        made = replace(drawn, layers=drawn.layers + mapped.layers, structures=structures)
        examined = volume.examined_in(mapped, masks)
        return made, replace(
            origin, preprocessing={**origin.preprocessing, **notes}, examined=examined
        )

    def _voxels(self, stack: dicom.Stack) -> tuple[np.ndarray, IntensityWindow]:
        """Return float32 ``[slice, row, column]``, and the middle slice's window, which is that of all."""
        options, count, first = self.options, len(stack.planes), stack.planes[0]
        if (voxels := count * first.rows * first.columns) > options.max_voxels:
            raise Unusable(TOO_LARGE, f"{voxels} voxels, {options.max_voxels} allowed")
        array = np.empty((count, first.rows, first.columns), dtype=np.float32)
        middle, frame = self.data, 0
        for index, plane in enumerate(stack.planes):
            data = dicom.open_dataset(options.root / plane.path) if plane.path else self.data
            if photometric_of(data) not in dicom_pixels.GREY:
                raise Unusable(COLOURED, f"{count} images")
            values = dicom_pixels.intensities(data, plane.frame)
            if values.shape != array.shape[1:]:
                raise Unusable(dicom.MIXED, f"{count} images")
            array[index] = values
            if index == count // 2:
                middle, frame = data, plane.frame
        return array, _window_of(middle, array, frame, window=options.window, voi=options.voi)

    def _drawn(self, stack: dicom.Stack | None) -> list[Mask]:
        """Return what was drawn into the images, in the order of the stack, if they have a place.

        Labels of what doesn't fit, or is drawn elsewhere, are lost.
        """
        root, where = self.options.root, volume.where_of(self.origin)
        masks: list[Mask] = []
        for path in self.payload["drawn"]:
            lost: Iterable[str] = [ANYTHING]
            try:
                data = open_drawn(root / path)
                lost = [label or ANYTHING for label in labels_of(data).values()]
                planes = stack.planes if stack else self.planes
                masks += masks_of(data, planes, stack, self.drops, where)
            except Unusable as error:
                self.drops.add(error.reason, where, error.detail, lost=lost)
        known = {label for label, _ in masks}
        for path in self.payload["elsewhere"]:
            with self.drops.annotation(where, ANYTHING):
                labels = labels_of(open_drawn(root / path)).values()
                if others := {label or ANYTHING for label in labels} - known:
                    self.drops.add(ELSEWHERE, where, lost=others)
        return masks


def _opened(options: Options, unit: Unit, drops: Drops) -> _Images:
    payload = unit.payload
    for lost, problem in payload["problems"]:
        drops.add("row of the table that can't be used", unit.key, problem, lost=lost)
    paths, drawn = ([options.root / path for path in payload[key]] for key in ("paths", "drawn"))
    maps = [options.root / path for path, _ in payload["masks"]]
    said = [Annotation(label, box) for label, box in payload["rows"] if label]
    if len(paths) > 1 and (boxed := [item.label for item in said if item.box is not None]):
        # Its slices are turned and perhaps cut another way: the box isn't where it was.
        drops.add(BOX_OF_SERIES, unit.key, ", ".join(boxed), lost=boxed)
        said = [item for item in said if item.box is None]
    if options.label == "folder":
        said.append(Annotation(paths[0].parent.name))
    data = dicom.open_dataset(paths[0])
    if options.burned_in == "drop":
        _refuse_burned_in(data)
    notes = {}
    for path in drawn:
        with contextlib.suppress(Unusable):  # `_drawn` says so
            if open_drawn(path).get("SegmentationType") == "FRACTIONAL":
                notes["segmentation"] = "fractions from one half up"
    # The places of slices are in the headers, those of frames in one of them.
    planes = dicom.frame_headers(data)
    if len(paths) > 1:
        planes = [read_header(options.root / name, name) for name in payload["paths"]]
    origin = Sample(
        volume.NO_PIXELS,
        unit.key,
        tuple(said),
        group=payload["group"],
        modality=modality_of(data),
        attributes=attributes_of(data, options.keep),
        preprocessing=notes,
        sha256=dicom_headers.sha256_of([*paths, *drawn, *maps]),
    )
    return _Images(options, payload, data, planes, origin, drops)

"""DICOM: single pictures, cine loops, series as volumes, with labels from a table, from SEG or from RTSTRUCT.

A series whose files are slices becomes a volume, which is cut into pictures as NIfTI is; every other file
gives one picture a frame. Segmentations are found by the series that they refer to.

Nothing that says who the patient is leaves this reader: see `dicom_headers` for what does. Files are often
named by patients, so the path is shown as a keyed hash too unless the job says ``anonymous_names: false``.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.rules import resolve
from data_tools.preprocess.volumes import LPS_TO_RAS, Volume, pack, to_ras
from data_tools.preprocess.windows import Scale, scale_for
from data_tools.readers import dicom_series, dicom_structures
from data_tools.readers.dicom_headers import (
    ATTRIBUTES,
    DIRECTORY,
    ENHANCED,
    NO_PICTURE,
    NO_PICTURES,
    SEGMENTATION,
    STRUCTURE_SET,
    Attribute,
    Header,
    Pseudonyms,
    attributes_of,
    modality_of,
    open_dataset,
    quiet,
    read_header,
    sha256_of,
)
from data_tools.readers.dicom_pixels import FileWindow, picture
from data_tools.readers.file_rows import FileRow, RowColumns, read_rows
from data_tools.readers.files import file_of, files, folder_of
from data_tools.readers.volume_samples import BadVolume, Origin, VolumeOptions, samples
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

ORPHAN = "segmentation without its series"
ONE_BY_ONE = "segmentation of a series whose pictures the table labels one by one"
BURNED_IN = "text burned into the picture"
BOX_OF_SERIES = "box of the table for a whole series"
Key = Literal["file", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]
_OF_A_PICTURE = ("file", "SOPInstanceUID")


class Options(VolumeOptions):
    """Keys of ``reader: dicom``.

    Args:
        files: which files below ``root``, with ``*`` for any text.
        table: CSV, TSV, JSON lines or Excel with labels, below ``root`` or beside the job.
        columns: its columns, see `file_rows.RowColumns`; ``file`` is the column of the key.
        match: what the key is: the path, or a UID or the patient's number, which stay in this reader. With
            ``file`` and ``SOPInstanceUID`` a row is about one picture, and slices of a series that has
            such rows are pictures by themselves, not a volume; with the others it is about every slice.
        label: ``folder``: the folder that a file lies in is its label.
        volumes: whether series of slices become volumes; else each file is a picture.
        segmentations: whether SEG and RTSTRUCT objects are read.
        window: as for volumes, or ``file``: the file's own VOI LUT or window.
        voi: which of the file's windows, by index or by its explanation.
        every: take each Nth frame of a file of several.
        at_most: frames of a file, spread evenly over those.
        keep: attributes that leave; ``PatientSex`` only if it is named here.
        burned_in: ``keep`` takes pictures too whose header says that text is burned in.
        anonymous_names: show a keyed hash in place of the path.
        salt: key of the hashes. Without it one is made of all patients and pictures of the source, which
            changes when files are added.
    """

    default_source_task: ClassVar[str] = "2D classification"

    reader: Literal["dicom"]
    files: str = "*"
    table: str | None = None
    columns: RowColumns = RowColumns()
    match: Key = "file"
    label: Literal["folder"] | None = None
    volumes: bool = True
    segmentations: bool = True
    window: FileWindow = "file"  # type: ignore[assignment]
    voi: int | str = 0
    every: int = Field(1, ge=1)
    at_most: int | None = Field(None, ge=1)
    keep: tuple[Attribute, ...] = ATTRIBUTES
    burned_in: Literal["drop", "keep"] = "drop"
    anonymous_names: bool = True
    salt: str | None = None

    @model_validator(mode="after")
    def _group_of_the_header(self) -> Options:
        if self.group is not None and self.anonymous_names:
            raise ValueError(
                "`group` looks at the path, which `anonymous_names` hides; leave one of them out (the "
                "patient of the header is the group by itself)"
            )
        return self


def units(options: Options) -> Iterator[Unit]:
    """A unit for each series of slices, and for every other file; files that can't be used as well.

    Only headers are read. They are held meanwhile, about a kilobyte a file.

    Raises:
        SourceError: there is no such folder or table.
    """
    folder_of(options.root, "", source=options.name, key="root")
    rows = _rows(options)
    headers: list[Header] = []
    bad: list[tuple[str, Unusable]] = []
    for name in files(options.root):
        if not fnmatch.fnmatch(name, options.files):
            continue
        try:
            found = read_header(options.root / name, name)
        except Unusable as error:
            bad.append((name, error))
        else:
            if found.sop_class != DIRECTORY:
                headers.append(found)
    names = Pseudonyms.for_source(options.salt, headers)

    def shown(path: str) -> str:
        return f"{names.of('file', path)}.dcm" if options.anonymous_names else path

    for path, error in bad:
        yield Unit(shown(path), {"drop": (error.reason, error.detail), "path": path})
    drawn: dict[str, list[str]] = defaultdict(list)
    series: dict[tuple[object, ...], list[Header]] = defaultdict(list)
    known = {header.series for header in headers}
    for header in headers:
        if header.sop_class in (SEGMENTATION, STRUCTURE_SET):
            if not options.segmentations:
                continue
            target = next((other for other in header.references if other in known), None)
            if target is None:
                drop_of = (ORPHAN, "the series that it was drawn on is not below the root")
                yield Unit(shown(header.path), {"drop": drop_of, "path": header.path})
            else:
                drawn[target].append(header.path)
        elif header.modality in NO_PICTURES:
            drop_of = (NO_PICTURE, header.modality)
            yield Unit(shown(header.path), {"drop": drop_of, "path": header.path})
        else:
            series[_stack_key(header)].append(header)
    for (uid, *_), members in series.items():
        # A table of pictures says nothing of their neighbours: their series isn't taken as one.
        one_by_one = options.match in _OF_A_PICTURE and any(
            _key(header, options.match) in rows for header in members
        )
        on_the_series = tuple(drawn.get(str(uid), ()))
        if one_by_one and on_the_series:
            for path in on_the_series:
                yield Unit(shown(path), {"drop": (ONE_BY_ONE, ""), "path": path})
            on_the_series = ()
        if options.volumes and not one_by_one and dicom_series.is_stack(members):
            parts = [members]
        else:
            parts = [[member] for member in members]
        for part in parts:
            first = part[0]
            labels = [row for header in part for row in rows.get(_key(header, options.match), ())]
            patient = first.patient or first.study or first.series or first.path
            yield Unit(
                shown(first.path),
                {
                    "paths": tuple(header.path for header in part),
                    "drawn": on_the_series,
                    "rows": tuple(
                        dict.fromkeys((row.label, row.box) for row in labels if not row.problem)
                    ),
                    "problems": tuple((row.label, row.problem) for row in labels if row.problem),
                    "group": names.of("patient", patient),
                },
            )


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the images of a file or of a series."""
    payload = unit.payload
    if "drop" in payload:
        raise Unusable(*payload["drop"])
    for label, problem in payload["problems"]:
        drops.add("row of the table that can't be used", unit.key, problem, lost=[label])
    paths = [options.root / path for path in payload["paths"]]
    said = [Annotation(label, box) for label, box in payload["rows"] if label]
    if len(paths) > 1 and (boxed := [item.label for item in said if item.box is not None]):
        # Its slices are turned and perhaps cut another way: the box isn't where it was.
        drops.add(BOX_OF_SERIES, unit.key, ", ".join(boxed), lost=boxed)
        said = [item for item in said if item.box is None]
    if options.label == "folder":
        said.append(Annotation(paths[0].parent.name))
    try:
        data = open_dataset(paths[0])
    except (OSError, ValueError) as error:
        raise Unusable("file can't be read", type(error).__name__) from error
    if options.burned_in == "drop" and str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise Unusable(BURNED_IN)
    origin = Origin(
        unit.key,
        group=payload["group"],
        modality=modality_of(str(data.get("Modality", ""))),
        attributes=attributes_of(data, options.keep),
        sha256=sha256_of([*paths, *(options.root / path for path in payload["drawn"])]),
        whole=tuple(said),
    )
    if len(paths) > 1 or (options.volumes and str(data.get("SOPClassUID", "")) in ENHANCED):
        yield from _volume(options, payload, data, origin, drops)
    else:
        yield from _frames(options, data, paths[0], origin, drops)


def read_picture(path: Path, *, source_file: str) -> Sample:
    """Return the image of a DICOM file of one frame, without annotations, for tables of labels.

    Args:
        path: of the file.
        source_file: what the sample calls it.

    Raises:
        Unusable: it holds no image or several, or can't be read.
    """
    try:
        data = open_dataset(path)
        if str(data.get("Modality", "")) in NO_PICTURES:
            raise Unusable(NO_PICTURE, str(data.Modality))
        if int(data.get("NumberOfFrames") or 1) > 1:
            frames = f"{data.NumberOfFrames} frames; the reader dicom takes them"
            raise Unusable("DICOM file of several frames", frames)
        if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
            raise Unusable(BURNED_IN)
        pixels, text = picture(data, path, 0, window="file", voi=0)
    except Unusable:
        raise
    except (OSError, ValueError) as error:
        raise Unusable("file can't be read", type(error).__name__) from error
    return Sample(
        pixels,
        source_file,
        modality=modality_of(str(data.get("Modality", ""))),
        attributes=attributes_of(data, ATTRIBUTES),
        preprocessing={"window": text},
    )


def _rows(options: Options) -> dict[str, list[FileRow]]:
    if options.table is None:
        return {}
    path = Path(options.table)
    if not path.is_absolute():
        path = file_of(options.root, options.table, source=options.name, key="table")
    return read_rows(options.name, path, options.columns)


def _stack_key(header: Header) -> tuple[object, ...]:
    """Equal for the slices of one stack; a series may hold several, such as the planes of a scout."""
    direction = tuple(round(value, 3) + 0.0 for value in header.orientation or ())
    echo, time, _ = header.order
    size = (header.rows, header.columns)
    return header.series or header.path, direction, size, echo, time


def _key(header: Header, match: Key) -> str:
    return {
        "file": header.path,
        "StudyInstanceUID": header.study,
        "SeriesInstanceUID": header.series,
        "SOPInstanceUID": header.instance,
        "PatientID": header.patient,
    }[match]


def _frames(
    options: Options, data: Any, path: Path, origin: Origin, drops: Drops
) -> Iterator[Sample]:
    """Yield an image for each frame."""
    count = int(data.get("NumberOfFrames") or 1)
    taken = list(range(0, count, options.every))
    if options.at_most is not None and len(taken) > options.at_most:
        places = np.linspace(0, len(taken) - 1, options.at_most).round().astype(int)
        taken = [taken[place] for place in places]
    edge = resolve(options.clean).min_edge_ratio
    for frame in taken:
        with drops.image(origin.source_file if count == 1 else f"{origin.source_file}#{frame}"):
            pixels, text = picture(data, path, frame, window=options.window, voi=options.voi)
            height, width = pixels.shape[:2]
            if count > 1 and min(height, width) < edge * max(height, width):
                raise Unusable("frame with a short edge", f"{width} x {height}")
            yield Sample(
                pixels,
                origin.source_file,
                origin.whole,
                part={} if count == 1 else {"frame": frame},
                group=origin.group,
                modality=origin.modality,
                attributes=origin.attributes,
                preprocessing={"window": text},
                sha256=origin.sha256,
            )


def _volume(
    options: Options, payload: dict[str, Any], data: Any, origin: Origin, drops: Drops
) -> Iterator[Sample]:
    if len(payload["paths"]) > 1:
        headers = [read_header(options.root / path, path) for path in payload["paths"]]
        headers, even = dicom_series.in_order(headers)
        volume, affine, shape, scale = dicom_series.stack(
            headers,
            options.root,
            window=options.window,
            voi=options.voi,
            max_voxels=options.max_voxels,
        )
        instances = [header.instance for header in headers]
        if not even:
            options, origin = _along_its_slices(options, origin, affine)
    else:
        volume, affine, shape, scale = _enhanced(options, data)
        instances = []
    drawn: list[dicom_structures.Mask] = []
    for path in payload["drawn"]:
        name = f"{origin.source_file}, what was drawn into it"
        with drops.annotation(origin.where):
            drawn += dicom_structures.masks_of(
                options.root / path, name, affine=affine, shape=shape, instances=instances
            )
    turned = [
        (label, to_ras(mask, LPS_TO_RAS @ affine)[0], attributes)
        for label, mask, attributes in drawn
    ]
    layers, structures = pack(turned, volume.voxels.shape)
    yield from samples(
        Volume(volume.voxels, volume.affine, layers, structures),
        origin,
        options,
        drops,
        scale=scale,
    )


def _along_its_slices(
    options: Options, origin: Origin, affine: np.ndarray
) -> tuple[Options, Origin]:
    """Slices with gaps between them are pictures, but nothing can be cut across them."""
    axis = dicom_series.own_axis(affine)
    if axis not in options.slices.axes:
        raise BadVolume(dicom_series.UNEVEN_CUT, f"its slices lie along {axis}; see `slices.axes`")
    slicing = options.slices.model_copy(update={"axes": (axis,)})
    notes = {**origin.preprocessing, "slices": "uneven distances"}
    return options.model_copy(update={"slices": slicing}), replace(origin, preprocessing=notes)


def _enhanced(
    options: Options, data: Any
) -> tuple[Volume, np.ndarray, tuple[int, int, int], Scale]:
    """An enhanced multi-frame object, whose frames each have their place."""
    import highdicom

    voxels = int(data.NumberOfFrames) * int(data.Rows) * int(data.Columns)
    if voxels > options.max_voxels:
        raise BadVolume("volume is too large", f"{voxels} voxels, {options.max_voxels} allowed")
    try:
        with quiet():
            found = highdicom.Image.from_dataset(data).get_volume(apply_voi_transform=False)
    except Exception as error:  # damaged objects make the library stumble over anything
        raise BadVolume("frames that make no volume", type(error).__name__) from error
    array = np.asarray(found.array, dtype=np.float32)
    turned, ras = to_ras(array, LPS_TO_RAS @ found.affine)
    modality = modality_of(str(data.get("Modality", "")))
    window = "auto" if options.window == "file" else options.window
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return Volume(turned, ras), found.affine, shape, scale_for(window, array, modality=modality)

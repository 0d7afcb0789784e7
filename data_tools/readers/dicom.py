"""DICOM: single images, cine loops, series as volumes, with labels from a table, from SEG or from RTSTRUCT.

A series whose files are slices becomes a volume, which is cut into images as NIfTI is; every other file
gives one image a frame. Segmentations are found by the series that they refer to.

Nothing that says who the patient is leaves this reader: see `dicom_headers` for what does. Files are often
named by patients, so the path is shown as a keyed hash too unless the job says ``anonymous_names: false``.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.rules import resolve
from data_tools.preprocess.volumes import pack
from data_tools.readers.dicom_headers import (
    ATTRIBUTES,
    DIRECTORY,
    SEGMENTATION,
    STRUCTURE_SET,
    Attribute,
    Pseudonyms,
    attributes_of,
    modality_of,
    read_header,
    sha256_of,
)
from data_tools.readers.dicom_volumes import (
    ENHANCED,
    Mask,
    load_enhanced,
    load_series,
    masks_of,
    scale_of,
)
from data_tools.readers.file_rows import FileRow, RowColumns, read_rows
from data_tools.readers.files import file_of, files, folder_of
from data_tools.readers.volume_samples import FileWindow, Origin, VolumeOptions, samples
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import (
    NO_PICTURE,
    NO_PICTURES,
    Header,
    is_stack,
    numbers,
    open_dataset,
    stack_axis,
)
from gmai_xtuner.core.imaging.dicom_pixels import COLOUR, colours, intensities, photometric_of
from gmai_xtuner.core.imaging.volumes import LPS_TO_RAS, to_ras

ORPHAN = "segmentation without its series"
ONE_BY_ONE = "segmentation of a series whose pictures the table labels one by one"
BURNED_IN = "text burned into the picture"
BOX_OF_SERIES = "box of the table for a whole series"
UNEVEN_CUT = "uneven series cut across its slices"
Key = Literal["file", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]
_OF_AN_IMAGE = ("file", "SOPInstanceUID")


class Options(VolumeOptions):
    """Keys of ``reader: dicom``.

    Args:
        files: which files below ``root``, with ``*`` for any text.
        table: CSV, TSV, JSON lines or Excel with labels, below ``root`` or beside the job.
        columns: its columns, see `file_rows.RowColumns`; ``file`` is the column of the key.
        match: what the key is: the path, or a UID or the patient's number, which stay in this reader. With
            ``file`` and ``SOPInstanceUID`` a row is about one image, and slices of a series that has
            such rows are images by themselves, not a volume; with the others it is about every slice.
        label: ``folder``: the folder that a file lies in is its label.
        volumes: whether series of slices become volumes; else each file is an image.
        segmentations: whether SEG and RTSTRUCT objects are read.
        window: as for volumes, or ``file``: the file's own VOI LUT or window.
        voi: which of the file's windows, by index or by its explanation.
        every: take each Nth frame of a file of several.
        at_most: frames of a file, spread evenly over those.
        keep: attributes that leave; ``PatientSex`` only if it is named here.
        burned_in: ``keep`` takes images too whose header says that text is burned in.
        anonymous_names: show a keyed hash in place of the path.
        salt: key of the hashes. Without it one is made of all patients and images of the source, which
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


# --- units --------------------------------------------------------------------------------------


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each series of slices, and for every other file; files that can't be used as well.

    Only headers are read. They are held meanwhile, about a kilobyte a file.

    Raises:
        SourceError: there is no such folder or table.
    """
    folder_of(options, "", key="root")
    rows = _rows(options)
    headers: list[Header] = []
    bad: list[tuple[str, Unusable]] = []
    for name in files(options):
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

    def dropped(path: str, reason: str, detail: str = "") -> Unit:
        return Unit(shown(path), {"drop": (reason, detail), "path": path})

    yield from (dropped(name, error.reason, error.detail) for name, error in bad)
    drawn: dict[str, list[str]] = defaultdict(list)
    series: dict[tuple[object, ...], list[Header]] = defaultdict(list)
    known = {header.series for header in headers}
    for header in headers:
        if header.sop_class in (SEGMENTATION, STRUCTURE_SET):
            target = next((other for other in header.references if other in known), None)
            if target is not None:
                drawn[target].append(header.path)
            elif options.segmentations:
                detail = "the series that it was drawn on is not below the root"
                yield dropped(header.path, ORPHAN, detail)
        elif header.modality in NO_PICTURES:
            yield dropped(header.path, NO_PICTURE, header.modality)
        else:
            series[_stack_key(header)].append(header)
    for (uid, *_), members in series.items():
        # A table of images says nothing of their neighbours: their series isn't taken as one.
        one_by_one = options.match in _OF_AN_IMAGE and any(
            _key(header, options.match) in rows for header in members
        )
        on_the_series = tuple(drawn[str(uid)]) if options.segmentations else ()
        if one_by_one and on_the_series:
            yield from (dropped(path, ONE_BY_ONE) for path in on_the_series)
            on_the_series = ()
        whole = options.volumes and not one_by_one and is_stack(members)
        for part in [members] if whole else [[member] for member in members]:
            first = part[0]
            labels = [row for header in part for row in rows.get(_key(header, options.match), ())]
            payload = {
                "paths": tuple(header.path for header in part),
                "drawn": on_the_series,
                "rows": tuple(
                    dict.fromkeys((row.label, row.box) for row in labels if not row.problem)
                ),
                "problems": tuple((row.label, row.problem) for row in labels if row.problem),
                "group": names.of(
                    "patient", first.patient or first.study or first.series or first.path
                ),
            }
            yield Unit(shown(first.path), payload)


def _rows(options: Options) -> dict[str, list[FileRow]]:
    if options.table is None:
        return {}
    path = Path(options.table)
    if not path.is_absolute():
        path = file_of(options, options.table, key="table")
    return read_rows(options.name, path, options.columns)


def _stack_key(header: Header) -> tuple[object, ...]:
    """Return what slices of one stack share; a series may hold several, such as the planes of a scout."""
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


# --- reading ------------------------------------------------------------------------------------


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
    data = open_dataset(paths[0])
    if options.burned_in == "drop" and _is_burned_in(data):
        raise Unusable(BURNED_IN)
    origin = Origin(
        unit.key,
        group=payload["group"],
        modality=modality_of(data),
        attributes=attributes_of(data, options.keep),
        sha256=sha256_of([*paths, *(options.root / path for path in payload["drawn"])]),
        whole=tuple(said),
    )
    if len(paths) > 1 or (options.volumes and str(data.get("SOPClassUID", "")) in ENHANCED):
        yield from _volume(options, payload, data, origin, drops)
    else:
        yield from _frames(options, data, origin, drops)


def read_picture(path: Path, *, source_file: str) -> Sample:
    """Return the image of a DICOM file of one frame, without annotations, for tables of labels.

    Args:
        path: of the file.
        source_file: what the sample calls it.

    Raises:
        Unusable: it holds no image or several, or can't be read.
    """
    data = open_dataset(path)
    if str(data.get("Modality", "")) in NO_PICTURES:
        raise Unusable(NO_PICTURE, str(data.Modality))
    if (count := _frame_count(data)) > 1:
        detail = f"{count} frames; the reader dicom takes them"
        raise Unusable("DICOM file of several frames", detail)
    if _is_burned_in(data):
        raise Unusable(BURNED_IN)
    pixels, text = _image(data, 0, window="file", voi=0)
    return Sample(
        pixels,
        source_file,
        modality=modality_of(data),
        attributes=attributes_of(data, ATTRIBUTES),
        preprocessing={"window": text},
    )


def _is_burned_in(data: Any) -> bool:
    return str(data.get("BurnedInAnnotation", "")).upper() == "YES"


def _frame_count(data: Any) -> int:
    return max(1, int((numbers(data, "NumberOfFrames") or [1])[0]))


def _image(data: Any, frame: int, *, window: FileWindow, voi: int | str) -> tuple[np.ndarray, str]:
    """Return uint8 ``[H, W]`` or ``[H, W, 3]`` of a frame, and the text for ``Sample.preprocessing``."""
    photometric = photometric_of(data)
    if photometric in COLOUR:
        return colours(data, frame)
    values = intensities(data, frame)
    scale = scale_of(data, values, frame=frame, window=window, voi=voi)
    if photometric == "MONOCHROME1":
        scale = scale.inverted("MONOCHROME1 turned round")
    return scale.apply(values), scale.text


def _frames(options: Options, data: Any, origin: Origin, drops: Drops) -> Iterator[Sample]:
    """Yield an image for each frame."""
    count = _frame_count(data)
    taken: Sequence[int] = range(0, count, options.every)
    if options.at_most is not None and len(taken) > options.at_most:
        places = np.linspace(0, len(taken) - 1, options.at_most).round().astype(int)
        taken = [taken[place] for place in places]
    edge = resolve(options.clean).min_edge_ratio
    for frame in taken:
        with drops.image(origin.source_file if count == 1 else f"{origin.source_file}#{frame}"):
            pixels, text = _image(data, frame, window=options.window, voi=options.voi)
            height, width = pixels.shape[:2]
            if count > 1 and min(height, width) < edge * max(height, width):
                raise Unusable("frame with a short edge", f"{width} x {height}")
            yield origin.sample(
                pixels, {"window": text}, part={} if count == 1 else {"frame": frame}
            )


def _volume(
    options: Options, payload: dict[str, Any], data: Any, origin: Origin, drops: Drops
) -> Iterator[Sample]:
    how: dict[str, Any] = {
        "window": options.window,
        "voi": options.voi,
        "max_voxels": options.max_voxels,
    }
    if len(payload["paths"]) > 1:
        headers = [read_header(options.root / path, path) for path in payload["paths"]]
        stack = load_series(headers, options.root, **how)
    else:
        stack = load_enhanced(data, **how)
    if (
        not stack.even
    ):  # slices with gaps between them are images, but nothing can be cut across them
        axis = stack_axis(stack.affine)
        if axis not in options.slices.axes:
            raise Unusable(UNEVEN_CUT, f"its slices lie along {axis}; see `slices.axes`")
        slicing = options.slices.model_copy(update={"axes": (axis,)})
        options = options.model_copy(update={"slices": slicing})
        notes = {**origin.preprocessing, "slices": "uneven distances"}
        origin = replace(origin, preprocessing=notes)
    drawn: list[Mask] = []
    for path in payload["drawn"]:
        name = f"{origin.source_file}, what was drawn into it"
        with drops.annotation(origin.where):
            drawn += masks_of(options.root / path, name, stack)
    volume = stack.volume()
    turned = [
        (label, to_ras(mask, LPS_TO_RAS @ stack.affine)[0], attributes)
        for label, mask, attributes in drawn
    ]
    layers, structures = pack(turned, volume.voxels.shape)
    volume = replace(volume, layers=layers, structures=structures)
    yield from samples(volume, origin, options, drops, scale=stack.scale)

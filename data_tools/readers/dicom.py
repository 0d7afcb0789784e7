# SPDX-License-Identifier: Apache-2.0

"""DICOM: single images, cine loops, series as volumes, with labels from a table, from SEG or from RTSTRUCT.

A series whose files are slices becomes a volume, which is cut into images as NIfTI is; every other file
gives one image a frame. Segmentations are found by the series or images that they refer to. Other images of
the study, and those that a segmentation doesn't fit, are incomplete for its labels.

Nothing that says who the patient is leaves this reader: see `dicom_headers` for what does. Files are often
named by patients, so the path is shown as a keyed hash too unless the job says ``anonymous_names: false``.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.preprocess.rules import resolve
from data_tools.preprocess.volumes import pack
from data_tools.readers.dicom_drawn import Mask, labels_of, masks_of, open_drawn
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
from data_tools.readers.dicom_volumes import ENHANCED, load_slices, scale_of
from data_tools.readers.file_rows import FileRow, RowColumns, read_rows
from data_tools.readers.files import IMAGE_SUFFIXES, file_of, files, folder_of
from data_tools.readers.volume_samples import FileWindow, Origin, VolumeOptions, samples
from data_tools.records import ANYTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import (
    DAMAGED,
    NO_PICTURE,
    NO_PICTURES,
    NOT_DICOM,
    Header,
    damage_as,
    frame_headers,
    open_dataset,
)
from gmai_xtuner.core.imaging.dicom_pixels import COLOUR, colours, intensities, photometric_of
from gmai_xtuner.core.imaging.dicom_stacks import Stack, alike, is_stack, stack_of
from gmai_xtuner.core.imaging.volumes import LPS_TO_RAS, to_ras

ORPHAN = "segmentation without its series"
ELSEWHERE = "segmentation of other images of the study"
COPY = "copy of a file of the same series"
BURNED_IN = "text burned into the picture"
BOX_OF_SERIES = "box of the table for a whole series"
FLAWED_CUT = "uneven or tilted series cut across its slices"
Key = Literal["file", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]
_OF_AN_IMAGE = ("file", "SOPInstanceUID")
_KINDS = (
    *(".json", ".jsonl", ".txt", ".csv", ".tsv", ".xlsx", ".xml", ".md", ".pdf", ".html", ".zip"),
    *(".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".npz", ".npy", ".mp4", ".dcm"),
    *IMAGE_SUFFIXES,
)
"""Suffixes that may be told of a file that is no DICOM; any other end of a name may be somebody's."""


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


WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"

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

    def shown(path: str, suffix: str = ".dcm") -> str:
        return f"{names.of('file', path)}{suffix}" if options.anonymous_names else path

    def dropped(path: str, reason: str, detail: str = "", suffix: str = ".dcm") -> Unit:
        return Unit(shown(path, suffix), {"drop": (reason, detail), "path": path})

    for name, fault in bad:
        reason, suffix = fault.reason, ".dcm"
        if reason == NOT_DICOM:
            suffix = next((kind for kind in _KINDS if name.lower().endswith(kind)), "")
            reason = f"{NOT_DICOM} ({suffix or 'of another kind'})"
        yield dropped(name, reason, fault.detail, suffix)
    segmentations = []
    images = []
    for header in headers:
        if header.sop_class in (*SEGMENTATION, STRUCTURE_SET):
            segmentations.append(header)
        elif header.sop_class == WHOLE_SLIDE:
            yield dropped(header.path, "whole-slide image", "read it with `reader: slide`")
        elif header.modality in NO_PICTURES:
            yield dropped(header.path, NO_PICTURE, header.modality)
        else:
            images.append(header)
    drawn: dict[str, list[str]] = defaultdict(list)
    of_study: dict[str, list[str]] = defaultdict(list)
    for header in segmentations if options.segmentations else ():
        targets = _targets(header, images, options.root)
        of_study[header.study or header.patient].append(header.path)
        for uid in targets:
            drawn[uid].append(header.path)
        if not targets:
            detail = "what it was drawn on is not below the root, or it doesn't say"
            yield dropped(header.path, ORPHAN, detail)
    for members in _groups(images):
        # A table of images says nothing of their neighbours: their series isn't taken as one.
        one_by_one = options.match in _OF_AN_IMAGE and any(
            _key(header, options.match) in rows for header in members
        )
        on_the_series = tuple(drawn[members[0].series])
        study = members[0].study or members[0].patient
        whole = options.volumes and not one_by_one and is_stack(members)
        if whole:
            copies = _copies(members, options.root)
            yield from (dropped(header.path, COPY) for header in copies)
            members = [header for header in members if header not in copies]
        for part in [members] if whole else [[member] for member in members]:
            first = part[0]
            labels = [row for header in part for row in rows.get(_key(header, options.match), ())]
            payload = {
                "paths": tuple(header.path for header in part),
                "drawn": on_the_series,
                "elsewhere": tuple(
                    path for path in of_study[study] if study and path not in on_the_series
                ),
                "rows": tuple(
                    dict.fromkeys((row.label, row.box) for row in labels if not row.problem)
                ),
                "problems": tuple((row.lost, row.problem) for row in labels if row.problem),
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


def _groups(images: Sequence[Header]) -> Iterator[list[Header]]:
    """Yield images that may be one stack; a series may hold several, such as the planes of a scout."""
    series: dict[tuple[object, ...], list[list[Header]]] = defaultdict(list)
    for header in images:
        echo, time, _ = header.order
        key = header.series or header.path, header.rows, header.columns, echo, time
        for group in series[key]:
            if alike(group[0], header):
                group.append(header)
                break
        else:
            series[key].append([header])
    return (group for groups in series.values() for group in groups)


def _copies(members: Sequence[Header], root: Path) -> list[Header]:
    """Return the files that are there again under another name, byte for byte."""
    instances = Counter(header.instance for header in members)
    seen, copies = set(), []
    for header in sorted(members, key=lambda member: member.path):
        if instances[header.instance] > 1:
            digest = sha256_of([root / header.path])
            if digest in seen:
                copies.append(header)
            seen.add(digest)
    return copies


def _targets(header: Header, images: Sequence[Header], root: Path) -> list[str]:
    """Return the series that a segmentation was drawn on: those that it names, or whose images it names."""
    known = dict.fromkeys(image.series for image in images if image.series)
    if named := [uid for uid in header.references if uid in known]:
        return named
    referred = set()
    try:
        with damage_as(DAMAGED):
            waiting = [open_dataset(root / header.path)]
            while waiting:
                for element in waiting.pop():
                    if element.VR == "SQ":
                        waiting += element.value
                    elif element.keyword == "ReferencedSOPInstanceUID":
                        referred.add(str(element.value))
    except Unusable:
        return []
    return list(dict.fromkeys(image.series for image in images if image.instance in referred))


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
    if "drop" in unit.payload:
        raise Unusable(*unit.payload["drop"])
    with damage_as(DAMAGED):
        yield from _read(options, unit, drops)


def _read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    payload = unit.payload
    for lost, problem in payload["problems"]:
        drops.add("row of the table that can't be used", unit.key, problem, lost=lost)
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
    notes = {}
    for path in payload["drawn"]:
        with contextlib.suppress(Unusable):  # `_drawn` says so
            if open_drawn(options.root / path).get("SegmentationType") == "FRACTIONAL":
                notes["segmentation"] = "fractions from one half up"
    origin = Origin(
        unit.key,
        preprocessing=notes,
        group=payload["group"],
        modality=modality_of(data),
        attributes=attributes_of(data, options.keep),
        sha256=sha256_of([*paths, *(options.root / path for path in payload["drawn"])]),
        whole=tuple(said),
    )
    # The places of slices are in the headers, those of frames in one of them.
    if len(paths) > 1:
        planes = [
            read_header(path, name) for path, name in zip(paths, payload["paths"], strict=True)
        ]
    else:
        planes = frame_headers(data)
    is_volume = (
        str(data.get("SOPClassUID", "")) in ENHANCED and options.volumes and is_stack(planes)
    )
    if len(paths) > 1 or is_volume:
        yield from _volume(options, payload, data, planes, origin, drops)
    else:
        yield from _frames(options, payload, data, planes, origin, drops)


def read_picture(path: Path, *, source_file: str) -> Sample:
    """Return the image of a DICOM file of one frame, without annotations, for tables of labels.

    Args:
        path: of the file.
        source_file: what the sample calls it.

    Raises:
        Unusable: it holds no image or several, or can't be read.
    """
    with damage_as(DAMAGED):
        data = open_dataset(path)
        if str(data.get("Modality", "")) in NO_PICTURES:
            raise Unusable(NO_PICTURE, str(data.Modality))
        if (count := len(frame_headers(data))) > 1:
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


def _image(data: Any, frame: int, *, window: FileWindow, voi: int | str) -> tuple[np.ndarray, str]:
    """Return uint8 ``[H, W]`` or ``[H, W, 3]`` of a frame, and the text for ``Sample.preprocessing``."""
    if photometric_of(data) in COLOUR:
        return colours(data, frame)
    values = intensities(data, frame)
    scale = scale_of(data, values, frame=frame, window=window, voi=voi)
    return scale.apply(values), scale.text


def _frames(
    options: Options,
    payload: dict[str, Any],
    data: Any,
    planes: Sequence[Header],
    origin: Origin,
    drops: Drops,
) -> Iterator[Sample]:
    """Yield an image for each frame, with what was drawn into it."""
    count = len(planes)
    taken: Sequence[int] = range(0, count, options.every)
    if options.at_most is not None and len(taken) > options.at_most:
        places = np.linspace(0, len(taken) - 1, options.at_most).round().astype(int)
        taken = [taken[place] for place in places]
    stack = None
    if planes[0].position and planes[0].orientation and (count == 1 or is_stack(planes)):
        with contextlib.suppress(Unusable):  # frames without a place may be referred to
            stack = stack_of(planes)
    masks = _drawn(options, payload, stack.planes if stack else planes, stack, origin, drops)
    of_frame = {frame: at for at, frame in enumerate(stack.order if stack else range(count))}
    edge = resolve(options.clean).min_edge_ratio
    for frame in taken:
        with drops.image(origin.source_file if count == 1 else f"{origin.source_file}#{frame}"):
            pixels, text = _image(data, frame, window=options.window, voi=options.voi)
            height, width = pixels.shape[:2]
            if count > 1 and min(height, width) < edge * max(height, width):
                raise Unusable("frame with a short edge", f"{width} x {height}")
            regions = tuple(
                Annotation(label, mask=mask[of_frame[frame]])
                for label, mask in masks
                if mask[of_frame[frame]].any()
            )
            part = {} if count == 1 else {"frame": frame}
            yield origin.sample(pixels, {"window": text}, annotations=regions, part=part)


def _volume(
    options: Options,
    payload: dict[str, Any],
    data: Any,
    planes: Sequence[Header],
    origin: Origin,
    drops: Drops,
) -> Iterator[Sample]:
    def data_of(plane: Header) -> Any:
        return open_dataset(options.root / plane.path) if plane.path else data

    how: dict[str, Any] = {"window": options.window, "voi": options.voi}
    slices = load_slices(planes, data_of, max_voxels=options.max_voxels, **how)
    stack = slices.stack
    if stack.flaw:
        if stack.axis not in options.slices.axes:
            detail = f"{stack.flaw}; its slices lie along {stack.axis}, see `slices.axes`"
            raise Unusable(FLAWED_CUT, detail)
        slicing = options.slices.model_copy(update={"axes": (stack.axis,)})
        options = options.model_copy(update={"slices": slicing})
        notes = {**origin.preprocessing, "slices": stack.flaw}
        origin = replace(origin, preprocessing=notes)
    masks = _drawn(options, payload, stack.planes, stack, origin, drops)
    volume = slices.volume()
    affine, nothing = LPS_TO_RAS @ stack.affine, dict[str, str]()
    turned = [(label, to_ras(mask, affine)[0], nothing) for label, mask in masks]
    layers, structures = pack(turned, volume.voxels.shape)
    volume = replace(volume, layers=layers, structures=structures)
    yield from samples(volume, origin, options, drops, scale=slices.scale)


def _drawn(
    options: Options,
    payload: dict[str, Any],
    planes: Sequence[Header],
    stack: Stack | None,
    origin: Origin,
    drops: Drops,
) -> list[Mask]:
    """Return what was drawn into images; labels of what doesn't fit, or is drawn elsewhere, are lost."""
    masks: list[Mask] = []
    for path in payload["drawn"]:
        lost: Iterable[str] = [ANYTHING]
        try:
            data = open_drawn(options.root / path)
            lost = [label or ANYTHING for label in labels_of(data).values()]
            masks += masks_of(data, planes, stack, drops, origin.where)
        except Unusable as error:
            drops.add(error.reason, origin.where, error.detail, lost=lost)
    known = {label for label, _ in masks}
    for path in payload["elsewhere"]:
        with drops.annotation(origin.where, ANYTHING):
            others = {
                label or ANYTHING for label in labels_of(open_drawn(options.root / path)).values()
            }
            if others - known:
                drops.add(ELSEWHERE, origin.where, lost=others - known)
    return masks

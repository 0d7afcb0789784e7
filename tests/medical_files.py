# SPDX-License-Identifier: Apache-2.0

"""Medical files of a few pixels, written as their formats say."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    SegmentationStorage,
    generate_uid,
)

PATIENT = "Musterfrau^Erika"


def dicom(
    values: np.ndarray,
    *,
    series: str = "1.2.3",
    position: Sequence[float] | None = None,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    **elements: Any,
) -> Dataset:
    """A data set of int16 or uint16 ``[H, W]`` or ``[N, H, W]``, of a patient with a name.

    Args:
        values: as stored.
        series: its UID.
        position: of the upper left voxel in LPS millimetres; None: without a place.
        orientation: of rows and columns.
        elements: further elements, or others than the default.
    """
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = series
    data.Modality = "CT"
    data.PatientName, data.PatientID = PATIENT, "PID-4711"
    data.PatientBirthDate, data.StudyDescription = "19500102", f"Follow-up of {PATIENT}"
    data.PhotometricInterpretation = "MONOCHROME2"
    data.SamplesPerPixel = 1
    data.Rows, data.Columns = values.shape[-2:]
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelRepresentation = int(values.dtype == np.int16)
    data.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if position is not None:
        data.ImagePositionPatient = list(position)
        data.ImageOrientationPatient = list(orientation)
        data.PixelSpacing = [1, 1]
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def item(**elements: Any) -> Dataset:
    """A sequence's item; dicts become sequences of one item."""
    made = Dataset()
    for name, value in elements.items():
        setattr(made, name, Items([item(**value)]) if isinstance(value, Mapping) else value)
    return made


def enhanced(
    values: np.ndarray, *, shared: Mapping[str, Any] | None = None, frames: Sequence[Any] = ()
) -> Dataset:
    """An enhanced CT, axial slices 2 mm apart, whose rescale and windows stand in functional groups.

    Args:
        values: int16 ``[N, H, W]``.
        shared: macros of all frames.
        frames: macros of each frame, beside its place.
    """
    data = dicom(values, SOPClassUID=EnhancedCTImageStorage)
    data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.3", "1.2.3.9"
    data.InstanceNumber = 1
    place = item(
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        PixelMeasuresSequence={"PixelSpacing": [1, 1], "SliceThickness": 2},
        **(shared or {}),
    )
    data.SharedFunctionalGroupsSequence = Items([place])
    data.PerFrameFunctionalGroupsSequence = Items(
        [
            item(
                PlanePositionSequence={"ImagePositionPatient": [0, 0, 2 * at]},
                FrameContentSequence={"DimensionIndexValues": [1, at + 1]},
                **(frames[at] if frames else {}),
            )
            for at in range(len(values))
        ]
    )
    return data


def save(data: Dataset, path: Path) -> Path:
    """As a DICOM file."""
    data.save_as(path, enforce_file_format=True)
    return path


def series(*, places: Sequence[float] = (0, 2, 4, 6, 8)) -> list[Dataset]:
    """Axial CT slices 3 rows x 4 columns; slice n holds 100 n, its upper left voxel 1000."""
    slices = []
    for number, place in enumerate(places):
        values = np.full((3, 4), 100 * number, dtype=np.int16)
        values[0, 0] = 1000
        slices.append(dicom(values, position=(-10, -20, place), InstanceNumber=number + 1))
    return slices


def as_bytes(data: Dataset) -> bytes:
    """The file of a data set."""
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    """A NIfTI-1 file; without an affine, one that names no orientation."""
    image = nibabel.Nifti1Image(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def seg(
    frames: Sequence[tuple[int, np.ndarray]],
    *,
    labels: Mapping[int, str] | None = None,
    places: Sequence[Mapping[str, Any]] = (),
    refer_to: Sequence[str] = (),
    of_series: str = "1.2.3",
    **elements: Any,
) -> Dataset:
    """A segmentation; pixels of 8 bits, which readers take as well as those of one.

    Args:
        frames: segment number and uint8 ``[H, W]``.
        labels: of the segments, by number; None: the first is a tumour.
        places: of each frame: ``ImagePositionPatient``, and ``ImageOrientationPatient`` if it isn't axial.
        refer_to: SOPInstanceUID of the image that each frame was drawn on.
        of_series: UID of the series that it names; empty: none.
        elements: as in `dicom`.
    """
    pixels = np.stack([values for _, values in frames])
    known = {"Modality": "SEG", "SOPClassUID": SegmentationStorage, "SegmentationType": "BINARY"}
    data = dicom(pixels, series="1.2.3.77", **known | elements)
    data.NumberOfFrames = len(frames)
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = pixels.astype(np.uint8).tobytes() + b"\0" * (pixels.size % 2)
    data.SegmentSequence = Items(
        [
            item(SegmentNumber=number, SegmentLabel=label)
            for number, label in (labels or {1: "tumour"}).items()
        ]
    )
    if of_series:
        data.ReferencedSeriesSequence = Items([item(SeriesInstanceUID=of_series)])
    groups = []
    for at, (number, _) in enumerate(frames):
        group = item(SegmentIdentificationSequence={"ReferencedSegmentNumber": number})
        if places:
            place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], **places[at]}
            for key in ("Position", "Orientation"):
                value = {f"Image{key}Patient": place[f"Image{key}Patient"]}
                setattr(group, f"Plane{key}Sequence", Items([item(**value)]))
            measures = item(PixelSpacing=place.get("PixelSpacing", [1, 1]))
            group.PixelMeasuresSequence = Items([measures])
        if refer_to:
            source = item(SourceImageSequence={"ReferencedSOPInstanceUID": refer_to[at]})
            group.DerivationImageSequence = Items([source])
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = Items(groups)
    return data


def structure_set(
    structures: Mapping[str, Sequence[Mapping[str, Any]]], *, of_series: str = "1.2.3"
) -> Dataset:
    """An RTSTRUCT of contours: ``{"liver": [{"points": [(x, y, z), ...], "kind": ..., "on": uid}]}``."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    data.Modality, data.SeriesInstanceUID = "RTSTRUCT", "1.2.3.78"
    study = {"RTReferencedSeriesSequence": {"SeriesInstanceUID": of_series}}
    data.ReferencedFrameOfReferenceSequence = Items([item(RTReferencedStudySequence=study)])
    data.StructureSetROISequence, data.ROIContourSequence = Items([]), Items([])
    for number, (name, contours) in enumerate(structures.items(), start=1):
        data.StructureSetROISequence.append(item(ROINumber=number, ROIName=name))
        drawn = item(ReferencedROINumber=number)
        drawn.ContourSequence = Items([])
        for contour in contours:
            values = [float(value) for point in contour["points"] for value in point]
            kind = contour.get("kind", "CLOSED_PLANAR")
            made = item(ContourGeometricType=kind, ContourData=values)
            if "on" in contour:
                image = {"ReferencedSOPInstanceUID": contour["on"]}
                made.ContourImageSequence = Items([item(**image)])
            drawn.ContourSequence.append(made)
        data.ROIContourSequence.append(drawn)
    return data

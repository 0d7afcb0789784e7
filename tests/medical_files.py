"""Medical files of a few pixels, written as their formats say."""

from __future__ import annotations

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

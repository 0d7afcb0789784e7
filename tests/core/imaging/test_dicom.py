"""DICOM pixels by hand and against pydicom, and the order of slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import header_of, is_dicom, open_dataset
from gmai_xtuner.core.imaging.dicom_pixels import (
    COLOUR,
    colours,
    file_scale,
    file_window,
    intensities,
    photometric_of,
)
from gmai_xtuner.core.imaging.dicom_stacks import stack_of
from gmai_xtuner.core.imaging.windows import Window
from tests import medical_files as made


def real(name: str) -> Path:
    return Path(get_testdata_file(name, download=False))


@pytest.mark.parametrize(
    "name",
    [
        *("CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm"),
        *("ExplVR_BigEnd.dcm", "examples_palette.dcm", "examples_rgb_color.dcm"),
        *("SC_rgb_rle_16bit.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_overlay.dcm"),
        *("693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "SC_rgb_jpeg_gdcm.dcm"),
    ],
)
def test_real_files_are_as_pydicom_applies_their_tables(name):
    assert is_dicom(real(name))
    data = open_dataset(real(name))
    if photometric_of(data) in COLOUR:
        shown, _ = colours(data)
        assert (shown.dtype, shown.shape) == (np.uint8, (data.Rows, data.Columns, 3))
        assert len(np.unique(shown)) > 1
        if "palette" not in name:
            stored = pixel_array(data)
            assert np.array_equal(shown, stored if stored.dtype == np.uint8 else stored >> 8)
        return
    stored = pixel_array(data)
    expected = apply_modality_lut(stored, data)
    measured = stored != data.get("PixelPaddingValue")
    assert np.array_equal(intensities(data)[measured], expected[measured])
    scale = file_scale(data)
    if scale is not None:
        windowed = apply_voi_lut(expected, data)
        low, high = windowed.min(), windowed.max()
        assert np.corrcoef(scale.apply(expected).ravel(), windowed.ravel())[0, 1] > 0.9999
        assert scale.apply(expected)[windowed == low].max() <= scale.apply(expected).min() + 1
        assert high > low


def test_rescale_comes_first_and_padding_is_the_smallest_value():
    values = np.array([[0, 1000, 1040, 1200, -2000]], dtype=np.int16)
    data = made.dicom(values, RescaleSlope=1, RescaleIntercept=-1000, PixelPaddingValue=-2000)
    assert intensities(data).tolist() == [[-1000, 0, 40, 200, -1000]]
    assert file_scale(data) is None


def test_frames_have_their_own_rescale_and_window():
    frames = [
        {
            "PixelValueTransformationSequence": {"RescaleSlope": slope, "RescaleIntercept": 10},
            "FrameVOILUTSequence": {"WindowCenter": center, "WindowWidth": 200},
        }
        for slope, center in ((1, 110), (2, 210))
    ]
    data = made.enhanced(np.array([[[0, 100]]] * 2, dtype=np.int16), frames=frames)
    assert [intensities(data, frame).tolist() for frame in (0, 1)] == [[[10, 110]], [[10, 210]]]
    assert file_window(data, 0) == Window(110, 200, "LINEAR")
    assert file_window(data, 1) == Window(210, 200, "LINEAR")


def with_table(descriptor: list[int], table: list[int], **elements) -> pydicom.Dataset:
    window = {"WindowCenter": 2, "WindowWidth": 4}
    values = np.array([[0, 1, 2, 3]], dtype=np.uint16)
    data = made.dicom(values, Modality="DX", **window | elements)
    item = made.item(LUTDescriptor=descriptor, LUTData=table)
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    data.VOILUTSequence = pydicom.Sequence([item])
    return data


def test_a_look_up_table_goes_before_the_window():
    scale = file_scale(with_table([4, 0, 8], [0, 255, 10, 20]))
    assert scale.text == "the file's VOI LUT"
    assert scale.apply(np.array([[0, 1, 2, 3]])).tolist() == [[0, 255, 10, 20]]


def test_one_of_several_windows_by_index_or_explanation():
    data = made.dicom(
        np.zeros((1, 1), np.int16),
        WindowCenter=["40", "-600"],
        WindowWidth=["400", "1500"],
        WindowCenterWidthExplanation=["SOFT", "LUNG"],
    )
    assert file_window(data) == Window(40, 400, "LINEAR")
    assert file_window(data, voi=1) == file_window(data, voi="lung") == Window(-600, 1500, "LINEAR")
    for voi in (2, "bone"):
        with pytest.raises(Unusable, match="no such window"):
            file_window(data, voi=voi)


def comma(**elements: str) -> pydicom.Dataset:
    """A data set with text where a number is expected, as scanners with a decimal comma write it."""
    data = made.series()[0]
    for name, text in elements.items():
        data[name] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(name), "DS", len(text), text.encode(), 0, False, True
        )
    return data


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (
            lambda: file_scale(with_table([4, 0, 8], [], WindowWidth=None)),
            "VOI LUT that can't be applied",
        ),
        (
            lambda: file_scale(
                made.dicom(np.zeros((1, 1), np.int16), WindowCenter=1, WindowWidth=0)
            ),
            "window that can't be applied",
        ),
        (
            lambda: file_scale(comma(WindowCenter="40,5", WindowWidth="400")),
            "DICOM header with wrong values",
        ),
        (
            lambda: header_of(comma(ImagePositionPatient="1\\2\\3,5")),
            "DICOM header with wrong values",
        ),
        (
            lambda: stack_of([header_of(made.series()[1]), header_of(comma(PixelSpacing="0\\0"))]),
            "series without a pixel spacing",
        ),
        (lambda: open_dataset(Path(__file__)), "not a DICOM file"),
        (lambda: open_dataset(Path("none")), "file can't be read"),
        (lambda: intensities(open_dataset(real("MR_truncated.dcm"))), "pixel data can't be read"),
        (lambda: intensities(open_dataset(real("rtplan.dcm"))), "DICOM object without a picture"),
    ],
)
def test_damage_has_a_reason(look, reason):
    with pytest.raises(Unusable) as caught:
        look()
    assert caught.value.reason == reason
    assert made.PATIENT not in str(caught.value)


def test_slices_are_ordered_along_their_normal():
    headers = [header_of(data) for data in made.series(places=(4, 0, 2, 7))]
    uneven = stack_of(headers)
    assert (uneven.order, uneven.flaw) == ((1, 2, 0, 3), "uneven distances")
    stack = stack_of(headers[:3])
    assert (stack.order, stack.flaw) == ((1, 2, 0), "")
    assert stack.affine.tolist() == [[0, 0, 1, -10], [0, 1, 0, -20], [2, 0, 0, 0], [0, 0, 0, 1]]
    with pytest.raises(Unusable, match="two slices at one place"):
        stack_of([header_of(data) for data in made.series(places=(0, 2, 2))])
    turned = made.series()
    turned[1].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    with pytest.raises(Unusable, match="differing sizes or directions"):
        stack_of([header_of(data) for data in turned])

# SPDX-License-Identifier: Apache-2.0

"""DICOM pixels by hand and against pydicom, and the order of slices."""

import io
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import header_of, is_dicom, open_dataset, stack_of
from gmai_xtuner.core.imaging.dicom_pixels import (
    COLOUR,
    colours,
    file_intensity_window,
    file_window,
    intensities,
    photometric_of,
)
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
    scale = file_intensity_window(data)
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
    assert file_intensity_window(data) is None


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
    scale = file_intensity_window(with_table([4, 0, 8], [0, 255, 10, 20]))
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
            lambda: file_intensity_window(with_table([4, 0, 8], [], WindowWidth=None)),
            "VOI LUT that can't be applied",
        ),
        (
            lambda: file_intensity_window(
                made.dicom(np.zeros((1, 1), np.int16), WindowCenter=1, WindowWidth=0)
            ),
            "window that can't be applied",
        ),
        (
            lambda: file_intensity_window(comma(WindowCenter="40,5", WindowWidth="400")),
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


# --- old, odd and hostile files -------------------------------------------------------------------

RAMP = np.arange(1024, dtype=np.uint16).reshape(32, 32)


def stored(values: np.ndarray, **elements) -> pydicom.Dataset:
    """A data set of values of 8 or 16 bits, as they are."""
    data = made.dicom(values[..., 0] if values.ndim == 3 else values, **elements)
    bits = 8 * values.dtype.itemsize
    data.BitsAllocated = bits
    data.BitsStored = elements.get("BitsStored", bits)
    data.HighBit = elements.get("HighBit", data.BitsStored - 1)
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    return data


def test_padding_is_black_whatever_black_is():
    values = np.array([[16383, 0, 5000]], dtype=np.uint16)
    keys = {"PixelPaddingValue": 16383, "Modality": "MG"}
    for photometric, black in (("MONOCHROME1", 5000), ("MONOCHROME2", 0)):
        data = stored(values, PhotometricInterpretation=photometric, **keys)
        assert intensities(data).tolist() == [[black, 0, 5000]]
    # -2000, written without its sign
    data = stored(np.array([[-2000, 7, 9]], dtype=np.int16))
    data.add_new("PixelPaddingValue", "US", 63536)
    assert intensities(data).tolist() == [[7, 7, 9]]


@pytest.mark.parametrize(("high", "at"), [(9, 0), (15, 6), (12, 3)])
def test_bits_beside_the_stored_ones_are_no_grey_levels(high, at):
    """Overlays of old files lie in the bits that are free, above or below."""
    overlay = np.uint16(~np.uint16((2**10 - 1) << at))
    for extra in (0, overlay):
        data = stored((RAMP << at) | np.uint16(extra), BitsStored=10, HighBit=high)
        assert np.array_equal(intensities(data), RAMP)


@pytest.mark.parametrize(
    ("descriptor", "table", "top"),
    [
        ([4096, 0, 16], list(range(4096)), 4095),  # 12 bits called 16
        ([4, 65533, 8], [0, 10, 20, 255], 255),  # begins at -3, without its sign
        ([300, 0, 8], [min(at, 255) for at in range(300)], 255),  # more entries than levels
    ],
)
def test_tables_of_a_voi_lut_are_read_by_their_entries(descriptor, table, top):
    data = with_table(descriptor, table, RescaleSlope=1, RescaleIntercept=-3)
    first = descriptor[1] - 65536 if descriptor[1] > 32767 else descriptor[1]
    values = np.arange(first, first + len(table))[None]
    expected = np.floor(np.array([table]) / top * 255 + 0.5)
    assert np.array_equal(file_intensity_window(data).apply(values), expected)


@pytest.mark.parametrize(("descriptor", "table"), [([4, 0, 8], [1]), ([4, 0, 8], [1, 2, 3, 999])])
def test_a_wrong_table_gives_way_to_the_window_beside_it(descriptor, table):
    scale = file_intensity_window(with_table(descriptor, table))
    assert scale.text == "the file's window W 4 L 2, LINEAR, its VOI LUT can't be applied"
    assert scale.apply(np.array([[0, 4]])).tolist() == [[0, 255]]


def test_a_window_below_one_is_exact():
    data = made.dicom(np.zeros((1, 1), np.int16), WindowCenter=0.25, WindowWidth=0.5)
    assert file_window(data) == Window(0.25, 0.5, "LINEAR_EXACT")


COLOURS = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 4)), axis=-1)
COLOURS = np.dstack([COLOURS, 255 - COLOURS[..., :1]]).astype(np.uint8)
GREY_RGB = np.repeat(COLOURS[..., :1], 3, axis=-1)
GREY_YBR = np.dstack([COLOURS[..., :1], np.full((64, 64, 2), 128, np.uint8)])


@pytest.mark.parametrize(
    ("values", "elements"),
    [
        (COLOURS, {"PlanarConfiguration": 1}),
        (np.moveaxis(COLOURS, -1, 0).reshape(64, 64, 3), {}),
        (GREY_YBR, {}),
        (GREY_RGB, {"PhotometricInterpretation": "YBR_FULL"}),
        (COLOURS, {"PhotometricInterpretation": "MONOCHROME2"}),
        (COLOURS, {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1}),
        (RAMP, {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1, "HighBit": 9}),
    ],
)
def test_pixels_that_contradict_their_header_are_refused(values, elements):
    known = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    data = stored(np.ascontiguousarray(values), **known | elements)
    if "HighBit" in elements:
        data.BitsStored = 12
    show = intensities if photometric_of(data) == "MONOCHROME2" else colours
    with pytest.raises(Unusable, match="contradict their header"):
        show(data)


@pytest.mark.parametrize(("values", "planar"), [(COLOURS, 0), (np.moveaxis(COLOURS, -1, 0), 1)])
def test_colours_as_they_are_declared_are_taken(values, planar):
    known = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}
    data = stored(COLOURS, PlanarConfiguration=planar, **known)
    data.PixelData = values.tobytes()
    assert np.array_equal(colours(data)[0], COLOURS)


@pytest.mark.parametrize("bare", [132, 0])
def test_a_file_without_a_preamble_is_read(tmp_path, bare):
    """With its group 0002, and from before there was one."""
    data = made.series()[1]
    whole = made.as_bytes(data)
    start = bare or whole.index(b"\x08\0\x16\0")
    (tmp_path / "a").write_bytes(whole[start:])
    assert is_dicom(tmp_path / "a")
    assert np.array_equal(intensities(open_dataset(tmp_path / "a")), data.pixel_array)


def coded(values: bytes, syntax: str, *, side: int) -> pydicom.Dataset:
    data = stored(np.zeros((1, 1), np.uint8))
    data.Rows = data.Columns = side
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.PixelData = pydicom.encaps.encapsulate([values])
    data["PixelData"].is_undefined_length = True
    return data


def test_decoders_that_a_header_misleads_cost_their_own_file():
    buffer = io.BytesIO()
    Image.new("L", (9000, 9000)).save(buffer, "JPEG2000")
    for side in (64, 30000):
        started = time.monotonic()
        with pytest.raises(Unusable, match="pixel data can't be read"):
            intensities(coded(buffer.getvalue(), pydicom.uid.JPEG2000Lossless, side=side))
        assert time.monotonic() - started < 10


def test_a_deflated_file_is_bounded(tmp_path, monkeypatch):
    data = made.series()[0]
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    path = made.save(data, tmp_path / "a")
    assert open_dataset(path).Rows == 3
    monkeypatch.setattr("gmai_xtuner.core.imaging.dicom.MAX_INFLATED", 100)
    with pytest.raises(Unusable, match="unpacks to too much"):
        open_dataset(path)

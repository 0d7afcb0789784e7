# SPDX-License-Identifier: Apache-2.0

"""Volume files: the formats against their own libraries, and headers that lie."""

import gzip
import struct
import warnings
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK
from highdicom.pixels import apply_voi_window

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.volume_headers import LPS_TO_RAS, open_volume
from gmai_xtuner.core.imaging.volumes import Grid, load, load_labels, on_grid
from gmai_xtuner.core.imaging.windows import PRESETS, Window, foreground_window, linear, window_for

AFFINE = np.array([[0, -2.0, 0, 1], [1, 0, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]])
LIMIT = 10**6


def voxels(*shape: int, dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def reason(path, **keys) -> tuple[str, str]:
    with pytest.raises(Unusable) as error:
        load(path, max_voxels=LIMIT, **keys)
    return error.value.reason, error.value.detail


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_nrrd_and_metaimage_are_read_as_itk_reads_them(tmp_path, suffix, compressed, vectors):
    array = voxels(7, 6, 5, *([3] if vectors else []))
    image = SimpleITK.GetImageFromArray(array, isVector=vectors)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing((1, 2, 3))
    image.SetOrigin((5, 6, 7))
    SimpleITK.WriteImage(image, str(tmp_path / f"a.{suffix}"), compressed)
    found = open_volume(tmp_path / f"a.{suffix}")
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = turn * (1, 2, 3), (5, 6, 7)
    assert np.allclose(found.affine, LPS_TO_RAS @ expected, atol=1e-6)
    assert found.grid == (5, 6, 7, 3 if vectors else 1)
    one = array[..., 2] if vectors else array
    assert np.array_equal(found.array(2 if vectors else 0), one.transpose(2, 1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mgz", "mgh", "hdr"])
def test_nifti_pairs_and_mgh_are_read_as_nibabel_reads_them(tmp_path, suffix, dtype):
    kinds = {"hdr": nibabel.Nifti1Pair, "mgz": nibabel.MGHImage, "mgh": nibabel.MGHImage}
    array = voxels(5, 6, 7, dtype=dtype)
    kinds.get(suffix, nibabel.Nifti1Image)(array, AFFINE).to_filename(tmp_path / f"a.{suffix}")
    for name in (f"a.{suffix}", *(["a.img"] if suffix == "hdr" else [])):
        found = open_volume(tmp_path / name)
        assert found.oriented
        assert np.allclose(found.affine, AFFINE, atol=1e-5)
        assert np.array_equal(found.array(0), array)


def test_scaled_numbers_and_one_of_several_channels(tmp_path):
    image = nibabel.Nifti1Image(np.linspace(-3, 9, 30).reshape(5, 3, 2), AFFINE)
    image.set_data_dtype(np.int16)
    image.to_filename(tmp_path / "a.nii.gz")
    expected = np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj).astype(np.float32)
    assert np.array_equal(open_volume(tmp_path / "a.nii.gz").array(0), expected)
    array = voxels(5, 6, 7, 3)
    nibabel.Nifti1Image(array, AFFINE).to_filename(tmp_path / "b.nii")
    assert np.array_equal(open_volume(tmp_path / "b.nii").array(1), array[..., 1])
    assert np.array_equal(open_volume(tmp_path / "b.nii").array(None), array)


def test_units_of_lengths_and_two_orientations(tmp_path):
    image = nibabel.Nifti1Image(voxels(5, 6, 7), np.diag([50, 50, 100, 1.0]))
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "a.nii")
    assert np.allclose(open_volume(tmp_path / "a.nii").affine, np.diag([0.05, 0.05, 0.1, 1]))
    image.set_qform(np.diag([-50, 50, 100, 1.0]), 1)
    image.to_filename(tmp_path / "b.nii")
    with pytest.raises(Unusable, match="contradict"):
        open_volume(tmp_path / "b.nii")


def test_a_flat_image_and_labels_off_by_the_rounding_of_a_slope(tmp_path):
    labels = np.zeros((8, 6), dtype=np.uint8)
    labels[2:4, 1:3], labels[5:7, 2:5] = 128, 255
    image = nibabel.Nifti1Image(labels, np.eye(4))
    image.header.set_slope_inter(2 / 255, 0)
    path = tmp_path / "a.nii.gz"
    with path.open("wb") as file:  # nibabel would scale the values back
        header = image.header
        header["vox_offset"], header["magic"] = 352, b"n+1"
        file.write(gzip.compress(header.binaryblock + b"\0" * 4 + labels.tobytes(order="F")))
    (layer,) = (found := load_labels(path, max_voxels=LIMIT)).layers
    assert layer.shape == (8, 6, 1)
    assert np.unique(layer).tolist() == [0, 1, 2]
    assert found.notes == {"labels": "rounded by up to 0.0039"}
    nibabel.Nifti1Image(labels / 300, np.eye(4)).to_filename(path)
    with pytest.raises(Unusable, match="label map with fractions"):
        load_labels(path, max_voxels=LIMIT)


def test_a_map_that_was_cut_out_lies_where_it_was_cut():
    whole = voxels(10, 9, 8, dtype=np.uint8)
    grid = Grid(whole, AFFINE)
    moved = AFFINE @ np.array([[1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 1, 4], [0, 0, 0, 1.0]])
    found = on_grid(whole[2:6, 3:9, 4:5], moved, grid)
    expected = np.zeros_like(whole)
    expected[2:6, 3:9, 4:5] = whole[2:6, 3:9, 4:5]
    assert np.array_equal(found, expected)
    half = moved.copy()
    half[:3, 3] += 0.5
    for labels, affine in (
        (whole[:4], half),
        (whole, moved),
        (whole[:4, :, ::-1], np.diag([1, 1, -1, 1.0])),
    ):
        with pytest.raises(Unusable, match="another grid"):
            on_grid(labels, affine, grid)


def segmentation(path, sizes: str, data: bytes, *lines: str) -> None:
    directions = "none " if sizes.count(" ") == 3 else ""
    header = [
        "NRRD0004",
        *("type: unsigned char", f"dimension: {sizes.count(' ') + 1}", f"sizes: {sizes}"),
        "space: left-posterior-superior",
        f"space directions: {directions}(1,0,0) (0,1,0) (0,0,1)",
        *("encoding: gzip", "space origin: (0,0,0)", *lines),
    ]
    path.write_bytes("\n".join(header).encode() + b"\n\n" + gzip.compress(data))


def test_layers_and_names_of_3d_slicer(tmp_path):
    layers = np.zeros((2, 4, 3, 2), dtype=np.uint8)
    layers[0, 1, 1, 1], layers[0, 2, 1, 1], layers[1, 1, 1, 1] = 1, 2, 1
    names = [
        "Segment0_Name:=liver",
        *("Segment0_LabelValue:=1", "Segment0_Layer:=0"),
        *("Segment1_Name:=spleen", "Segment1_LabelValue:=2", "Segment1_Layer:=0"),
        *("Segment2_Name:=liver cyst", "Segment2_LabelValue:=1", "Segment2_Layer:=1"),
    ]
    segmentation(tmp_path / "a.seg.nrrd", "2 4 3 2", layers.tobytes(order="F"), *names)
    found = load_labels(tmp_path / "a.seg.nrrd", max_voxels=LIMIT)
    assert [(item.name, item.layer, item.value) for item in found.segments] == [
        *(("liver", 0, 1), ("spleen", 0, 2), ("liver cyst", 1, 1))
    ]
    assert [layer.sum() for layer in found.layers] == [3, 1]


def test_units_of_lengths_of_nrrd_and_metaimage(tmp_path):
    path, cells = tmp_path / "a.nrrd", bytes(8)
    segmentation(path, "2 2 2", cells, 'space units: "um" "um" "um"')
    assert np.allclose(open_volume(path).affine, np.diag([-1e-3, -1e-3, 1e-3, 1]))
    for units in ('"um" "mm" "mm"', '"parsec" "parsec" "parsec"'):
        segmentation(path, "2 2 2", cells, f"space units: {units}")
        assert "lengths in" in reason(path)[1]
    text = META + "DistanceUnits = cm\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(text.encode() + cells)
    assert np.allclose(open_volume(tmp_path / "a.mha").affine, np.diag([-10, -10, 10, 1]))


# --- hostile headers ------------------------------------------------------------------------------

NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nspace: LPS\n"
NRRD += "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
META += "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\n"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("nhdr", NRRD + "data file: {}\n"),
        ("nhdr", NRRD + "datafile:{}\n"),
        ("nhdr", NRRD + "data file:\t {}\n"),
        ("nrrd", NRRD + "data file: {}\n\n"),
        ("nhdr", NRRD + "# " + "x" * 80_000 + "\ndata file: {}\n"),
        ("nhdr", NRRD + "data file: LIST\n{}\n"),
        ("nhdr", NRRD + "data file: {}%03d 1 1 1\n"),
        ("mhd", META + "ElementDataFile = {}\n"),
        ("mhd", META + "ElementDataFile={}"),
        ("mhd", META + "ElementDataFile\t=\t{}\n"),
        ("mhd", META + "ElementDataFile : {}\n"),
        ("mhd", META + "Comment = " + "x" * 80_000 + "\nElementDataFile = {}\n"),
        ("mhd", META + "ElementDataFile = LIST\n{}\n"),
        ("mhd", META + "ElementDataFile = {}%03d 1 1 1\n"),
        ("mhd", "ElementDataFile = LOCAL\n" + META + "ElementDataFile = {}\n"),
    ],
)
@pytest.mark.parametrize("name", ["{}/secret", "../secret", "link", "..\\secret"])
def test_no_header_leads_to_another_file(tmp_path, suffix, text, name):
    (tmp_path / "secret").write_bytes(bytes(range(8)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "secret")
    path = tmp_path / f"set/a.{suffix}"
    path.write_text(text.format(name.format(tmp_path)))
    assert reason(path)[0] in ("path outside the source", "volume can't be read")
    if (
        "LIST" not in text
        and "%" not in text
        and name == "link"
        and " : " not in text
        and "LOCAL" not in text
    ):
        assert load(path, max_voxels=LIMIT, within=[tmp_path]).array.size == 8


def packed(content):
    return gzip.compress(content, mtime=0)  # the same name of a test in every worker


def nifti(shape, *, offset=352.0, data=b"", extension=b"") -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header["sform_code"], header["vox_offset"], header["magic"] = 1, offset, b"n+1"
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    return header.binaryblock + b"\1\0\0\0" + extension + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nii", nifti((1000, 1000, 1000))),
        ("a.nii.gz", packed(nifti((100, 100, 90)))),
        ("a.nii", nifti((4, 4, 4), offset=2.0**30)),
        ("a.nii.gz", packed(nifti((4, 4, 4), offset=2.0**36))),
        ("a.nii", nifti((4, 4, 4), data=b"\0" * 127)),
        ("a.nii.gz", packed(nifti((4, 4, 4), data=b"\0" * 127))),
        ("a.nii", b""),
        ("a.nii.gz", packed(nifti((4, 4, 4), data=b"\0" * 128))[:-30]),
        ("a.nrrd", NRRD.encode() + b"\n1234567"),
        ("a.nrrd", (NRRD + "#" + "x" * 2**20).encode()),
        ("a.nrrd", NRRD.encode() + b"byte skip: 99\n\n12345678"),
        ("a.nrrd", NRRD.replace("raw", "hex").encode() + b"\n" + b"0" * 16),
        ("a.nrrd", NRRD.replace("uint8", "block").encode() + b"\n" + b"0" * 16),
        ("a.nrrd", b"NRRD0004\n" + b"sizes: 1\n" * 2),
        ("a.mha", META.encode()),
        (
            "a.mha",
            (META + "CompressedData = True\nElementDataFile = LOCAL\n").encode()
            + zlib.compress(b"1234"),
        ),
        ("a.mha", b"NDims = x\nElementDataFile = LOCAL\n"),
    ],
)
def test_what_a_header_promises_is_held_against_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = reason(tmp_path / name)
    assert found[0] in (
        "volume can't be read",
        "voxels that are no grey levels",
        "volume is too large",
    )
    assert str(tmp_path) not in found[1]


def test_extensions_are_passed_over(tmp_path):
    extension = struct.pack("<ii", 2**20, 6) + b"\0" * (2**20 - 8)
    content = nifti((2, 2, 2), offset=352 + 2**20, data=bytes(range(16)), extension=extension)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    assert load(tmp_path / "a.nii.gz", max_voxels=LIMIT).array[1, 0, 0] == 0x0302


# --- Grey levels by hand, and windows as highdicom applies them ---


VALUES = np.array([[-1000, -160, -159, 40, 240, 3000]], dtype=np.int16)


def levels(window, modality="CT", values=VALUES):
    return window_for(window, values, modality=modality).apply(values).tolist()


def test_a_line_is_rounded_half_up_and_clipped():
    assert linear(np.array([[-1, 0, 1, 2, 3]]), 0, 2).tolist() == [[0, 0, 128, 255, 255]]
    assert linear(np.array([[5, 5]]), 5, 5).tolist() == [[0, 0]]


def test_soft_tissue_by_name_level_and_ends():
    # (x + 160) / 400 * 255: -159 -> 0.6375, 40 -> 127.5
    expected = [[0, 0, 1, 128, 255, 255]]
    for window in ("soft tissue", Window(40, 400), (-160, 240)):
        assert levels(window) == expected
    assert PRESETS["soft_tissue"].apply(VALUES).tolist() == expected
    assert window_for(Window(40, 400), VALUES, modality=None).text == "window W 400 L 40"


def test_auto_is_soft_tissue_for_ct_alone():
    assert levels("auto", "CT") == levels("soft tissue")
    assert levels("auto", "computed tomography") == levels("soft tissue")
    assert levels("auto", "MR") == levels("percentile", "MR")
    # stored values without the rescale that makes Hounsfield units of them
    assert window_for("auto", VALUES + 1024, modality="CT").text.startswith("percentiles")


def test_percentiles_look_at_the_foreground():
    values = np.concatenate([np.zeros(5000), np.arange(1, 1001)]).reshape(100, 60)
    scale = window_for("percentile", values, modality="MR")
    # the 0.5th and 99.5th of 1..1000, linear between ranks
    assert "5.995 to 995.005" in scale.text
    assert scale.apply(np.array([[0, 5.995, 995.005, 1000]])).tolist() == [[0, 0, 255, 255]]
    window = foreground_window(values)
    assert (window.center, window.width) == pytest.approx((500.5, 989.01))


def test_slice_and_volume_differ():
    volume = np.array([[[0, 10], [20, 100]]])
    plane = volume[:, 0]
    assert window_for("slice", volume, modality=None).apply(plane).tolist() == [[0, 255]]
    assert window_for("volume", volume, modality=None).apply(plane).tolist() == [[0, 26]]


def test_a_mask_is_black_and_white():
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1, 1] = 1
    assert np.unique(foreground_window(mask).apply(mask)).tolist() == [0, 255]
    flat = np.full((4, 4), 7.0)
    assert foreground_window(flat).apply(flat).shape == (4, 4)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (-600.5, 1500), (3, 2)])
def test_the_functions_of_the_standard_are_highdicoms(function, center, width):
    values = np.arange(-2000, 2000, dtype=np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = apply_voi_window(
            values.astype(np.float64), center, width, function, output_range=(0.0, 255.0)
        )
    ours = Window(center, width, function).apply(values)
    difference = np.abs(ours - np.floor(theirs + 0.5))
    # halves are rounded by the last bit of differently ordered sums
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_width_of_one_is_a_threshold():
    """Where highdicom divides by 0; PS3.3 C.11.2.1.2.1: above the centre less one half is white."""
    assert Window(3, 1, "LINEAR").apply(np.array([2, 2.5, 2.6, 3])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [
        (0, 0, "LINEAR_EXACT"),
        (0, 0.5, "LINEAR"),
        (float("nan"), 5, "LINEAR"),
        (0, -1, "SIGMOID"),
        (0, 5, "CUBIC"),
    ],
)
def test_impossible_windows_are_refused(center, width, function):
    with pytest.raises(ValueError, match=r"a window needs|unknown"):
        Window(center, width, function)

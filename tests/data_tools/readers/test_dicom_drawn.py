# SPDX-License-Identifier: Apache-2.0

"""SEG and RTSTRUCT on the images' own pixels, and what is lost where they don't fit."""

from pathlib import Path

import nrrd
import numpy as np
import pytest
from pydicom.dataset import Dataset

from data_tools.readers import dicom
from data_tools.records import ANYTHING
from tests import medical_files as made
from tests.data_tools.readers.sets import read_units
from tests.data_tools.readers.test_dicom import options

PLACES = (0, 2, 4, 6)


def axial(places=PLACES, **elements) -> list[Dataset]:
    """Slices of 8 rows and 6 columns of 1 mm, from (-10, -20); all of them differ."""
    draw = np.random.default_rng(0)
    return [
        made.dicom(
            draw.integers(0, 900, (8, 6)).astype(np.int16),
            position=(-10, -20, place),
            InstanceNumber=number,
            StudyInstanceUID="1.2",
            **elements,
        )
        for number, place in enumerate(places)
    ]


def region(row: int = 2, column: int = 1, *, value: int = 1) -> np.ndarray:
    """Two rows and three columns without a symmetry of the grid."""
    values = np.zeros((8, 6), np.uint8)
    values[row : row + 2, column : column + 3] = value
    return values


EXPECTED = region().astype(bool)


def at(place: float, x: float = -10, y: float = -20, **others) -> dict:
    return {"ImagePositionPatient": [x, y, place], **others}


def save(root: Path, *objects: Dataset) -> None:
    for number, data in enumerate(objects):
        made.save(data, root / f"{number}.dcm")


def found_in(root: Path, images, *drawn, _root=None, **keys):
    """Masks by label and slice, the reasons of drops, and the labels that are lost."""
    save(root, *images, *drawn)
    chosen = {"slices": {"axes": ["z"], "keep": "all"}, "window": "slice"} | keys
    samples, drops, lacking = read_units(dicom, options(_root or root, **chosen))
    masks = {
        (item.label, sample.part.get("slice", 0)): item.mask
        for sample in samples
        for item in sample.annotations
    }
    return masks, sorted({drop.reason for drop in drops}), set().union(*map(set, lacking))


# --- SEG ---

FRACTIONS = {"SegmentationType": "FRACTIONAL", "MaximumFractionalValue": 255}


@pytest.mark.parametrize(
    "make",
    [
        lambda s: made.seg([(1, region())], places=[at(4)]),
        # rows and columns run the other way
        lambda s: made.seg(
            [(1, region()[::-1, ::-1])],
            places=[at(4, -5, -13, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])],
        ),
        # rows are columns
        lambda s: made.seg(
            [(1, np.ascontiguousarray(region().T))],
            places=[at(4, ImageOrientationPatient=[0, 1, 0, 1, 0, 0])],
        ),
        # cut out of the grid, and a piece beyond it
        lambda s: made.seg([(1, region()[1:, 1:])], places=[at(4, -9, -19)]),
        lambda s: made.seg([(1, np.pad(region(), 3))], places=[at(4, -13, -23)]),
        # no place, but a reference; no series, but an image
        lambda s: made.seg([(1, region())], refer_to=[s[2].SOPInstanceUID]),
        lambda s: made.seg([(1, region())], refer_to=[s[2].SOPInstanceUID], of_series=""),
        lambda s: made.seg([(1, region())], places=[at(4)], SegmentationType="LABELMAP"),
        lambda s: made.seg([(1, region(value=200))], places=[at(4)], **FRACTIONS),
        # written from a binary mask
        lambda s: made.seg([(1, region())], places=[at(4)], **FRACTIONS),
    ],
)
def test_a_segment_lies_on_the_pixels_of_its_slice(tmp_path, make):
    slices = axial()
    masks, reasons, lost = found_in(tmp_path, slices, make(slices))
    # axial slices are shown as they are stored
    assert list(masks) == [("tumour", 2)]
    assert np.array_equal(masks["tumour", 2], EXPECTED)
    assert (reasons, lost) == ([], set())


def test_the_threshold_of_fractions_is_said(tmp_path):
    save(tmp_path, *axial(), made.seg([(1, region())], places=[at(4)], **FRACTIONS))
    samples, *_ = read_units(dicom, options(tmp_path, slices={"axes": ["z"]}))
    assert {s.preprocessing["segmentation"] for s in samples} == {"fractions from one half up"}


def test_frames_across_the_slices_are_put_on_them(tmp_path):
    """A sagittal frame of x = -9: its columns run along y, its rows along z, downwards."""
    values = np.zeros((4, 8), np.uint8)
    values[1, 2:4] = 1
    place = at(6, -9, -20, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], PixelSpacing=[2, 1])
    masks, reasons, _ = found_in(tmp_path, axial(), made.seg([(1, values)], places=[place]))
    expected = np.zeros((8, 6), bool)
    expected[2:4, 1] = True
    assert (list(masks), reasons) == ([("tumour", 2)], [])
    assert np.array_equal(masks["tumour", 2], expected)


OTHER = "segmentation on another grid than its images"


@pytest.mark.parametrize(
    ("make", "reason", "lost"),
    [
        # half a pixel, half a slice, other pixels, a reference to another slice, neither of both
        (lambda s: made.seg([(1, region())], places=[at(4, -10.5)]), OTHER, "tumour"),
        (lambda s: made.seg([(1, region())], places=[at(5)]), OTHER, "tumour"),
        (lambda s: made.seg([(1, region())], places=[at(4, PixelSpacing=[2, 2])]), OTHER, "tumour"),
        (
            lambda s: made.seg([(1, region())], places=[at(4)], refer_to=[s[1].SOPInstanceUID]),
            OTHER,
            "tumour",
        ),
        (lambda s: made.seg([(1, region())]), OTHER, "tumour"),
        # every second slice only
        (lambda s: made.seg([(1, region())] * 2, places=[at(0), at(4)]), OTHER, "tumour"),
        # probabilities, none of one half
        (
            lambda s: made.seg([(1, region(value=80))], places=[at(4)], **FRACTIONS),
            "segmentation of fractions under one half",
            "tumour",
        ),
        (
            lambda s: made.seg([(1, region())], labels={1: ""}, places=[at(4)]),
            "structure whose label is missing or names somebody",
            ANYTHING,
        ),
        (
            lambda s: made.seg([(1, region())], labels={1: "Erika left"}, places=[at(4)]),
            "structure whose label is missing or names somebody",
            ANYTHING,
        ),
        (
            lambda s: made.seg([(1, region())], places=[at(4)], PixelData=b"\0\0"),
            "pixel data can't be read",
            "tumour",
        ),
        (
            lambda s: made.seg([(1, region())], places=[at(4)], of_series="9.9"),
            "segmentation of other images of the study",
            "tumour",
        ),
    ],
)
def test_what_does_not_fit_is_lost_with_its_label(tmp_path, make, reason, lost):
    slices = axial()
    segmentation = make(slices)
    segmentation.StudyInstanceUID = "1.2"
    if reason.startswith("pixel"):
        segmentation.PixelData = b"\0\0"
    masks, reasons, lacking = found_in(tmp_path, slices, segmentation)
    assert not masks
    assert reason in reasons
    assert lacking == {lost}


@pytest.mark.parametrize("keys", [{}, {"volumes": False}])
def test_single_images_have_their_segments(tmp_path, keys):
    """One slice; and a projection, which has no place in the body."""
    (one,) = axial([4])
    masks, *_ = found_in(tmp_path, [one], made.seg([(1, region())], places=[at(4)]), **keys)
    assert np.array_equal(masks["tumour", 0], EXPECTED)
    plain = made.dicom(np.arange(48, dtype=np.int16).reshape(8, 6), Modality="DX")
    (tmp_path / "b").mkdir()
    drawn = made.seg([(1, region())], refer_to=[plain.SOPInstanceUID])
    masks, *_ = found_in(tmp_path / "b", [plain], drawn, **keys)
    assert np.array_equal(masks["tumour", 0], EXPECTED)


def test_slices_that_are_read_one_by_one_have_their_own_segments_alone(tmp_path):
    save(tmp_path, *axial(), made.seg([(1, region())], places=[at(4)]))
    samples, drops, _ = read_units(dicom, options(tmp_path, volumes=False))
    assert [len(sample.annotations) for sample in samples] == [0, 0, 1, 0]
    assert not drops


def test_a_series_is_incomplete_for_what_is_drawn_on_another_of_its_study(tmp_path):
    segmentation = made.seg([(1, region())], places=[at(4)], StudyInstanceUID="1.2")
    save(tmp_path, *axial(), *axial(series="1.2.4"), segmentation)
    chosen = options(tmp_path, slices={"axes": ["z"]}, window="slice")
    samples, drops, lacking = read_units(dicom, chosen)
    assert {
        bool(sample.annotations): labels for sample, labels in zip(samples, lacking, strict=True)
    } == {True: (), False: ("tumour",)}
    assert [drop.reason for drop in drops] == ["segmentation of other images of the study"]


# --- RTSTRUCT ---


def square(place: float, x1: int, y1: int, x2: int, y2: int, **others) -> dict:
    """Through the centres of the corner pixels."""
    corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    return {"points": [(x - 10, y - 20, place) for x, y in corners], **others}


def filled(*boxes: tuple[int, int, int, int], hole: tuple[int, int, int, int] | None = None):
    mask = np.zeros((8, 6), bool)
    for box in (*boxes, *([hole] if hole else [])):
        x1, y1, x2, y2 = box
        mask[y1 : y2 + 1, x1 : x2 + 1] = box != hole
    return mask


OUTER, INNER, BESIDE = (0, 0, 4, 6), (1, 2, 3, 4), (3, 5, 5, 7)


@pytest.mark.parametrize(
    ("contours", "expected"),
    [
        ([square(4, *OUTER), square(4, *INNER)], filled(OUTER, hole=INNER)),
        ([square(4, *INNER), square(4, *OUTER)], filled(OUTER, hole=INNER)),
        ([square(4, *OUTER), square(4, *BESIDE)], filled(OUTER, BESIDE)),
        ([square(4, *OUTER), square(4, *OUTER)], filled(OUTER)),
        (
            [square(4, *box, kind="CLOSEDPLANAR_XOR") for box in (OUTER, INNER)],
            filled(OUTER, hole=INNER),
        ),
        ([square(4, *INNER, kind="INTERPOLATED_PLANAR")], filled(INNER)),
        # beyond the image's edge, and in slices that the series hasn't
        ([square(4, -9, -9, 2, 3), square(40, *OUTER)], filled((0, 0, 2, 3))),
    ],
)
def test_contours_that_bound_a_region(tmp_path, contours, expected):
    masks, reasons, lost = found_in(tmp_path, axial(), made.structure_set({"liver": contours}))
    assert (list(masks), reasons, lost) == ([("liver", 2)], [], set())
    assert np.array_equal(masks["liver", 2], expected)


NO_REGION = "contour that bounds no region"


@pytest.mark.parametrize(
    ("contours", "reason"),
    [
        *(([square(4, *INNER, kind=kind)], NO_REGION) for kind in ("OPEN_PLANAR", "POINT", "X")),
        ([square(4, *INNER) | {"points": [(0, 0, 4)]}], NO_REGION),
        ([square(5, *INNER)], OTHER),
        ([square(4, *INNER, on="slice 1")], OTHER),
        ([], "structure without contours"),
    ],
)
def test_contours_that_are_lost_with_their_label(tmp_path, contours, reason):
    slices = axial()
    for contour in contours:
        if "on" in contour:
            contour["on"] = slices[1].SOPInstanceUID
    both = {"liver": contours, "spleen": [square(2, *INNER)]}
    masks, reasons, lost = found_in(tmp_path, slices, made.structure_set(both))
    assert (list(masks), reasons, lost) == ([("spleen", 1)], [reason], {"liver"})


def test_contours_of_uneven_slices_lie_on_their_own(tmp_path):
    slices = axial([0, 3, 6, 9, 12, 18, 24])
    drawn = [square(12, *INNER, on=slices[4].SOPInstanceUID), square(18, *OUTER)]
    masks, reasons, lost = found_in(tmp_path, slices, made.structure_set({"lesion": drawn}))
    assert (list(masks), reasons, lost) == ([("lesion", 4), ("lesion", 5)], [], set())


@pytest.mark.parametrize("how", ["contour", "segment"])
def test_what_is_drawn_on_one_time_point_is_not_put_on_another(tmp_path, how):
    first, second = (axial(TemporalPositionIdentifier=time) for time in (1, 2))
    uid = second[2].SOPInstanceUID
    drawn = made.structure_set({"tumour": [square(4, *INNER, on=uid)]})
    if how == "segment":
        drawn = made.seg([(1, region())], places=[at(4)], refer_to=[uid])
    save(tmp_path, *first, *second, drawn)
    keys = {"slices": {"axes": ["z"], "keep": "all"}, "window": "slice"}
    samples, drops, lacking = read_units(dicom, options(tmp_path, **keys))
    found = [(len(one.annotations), lost) for one, lost in zip(samples, lacking, strict=True)]
    assert sorted(found) == [*[(0, ())] * 3, *[(0, ("tumour",))] * 4, (1, ())]
    assert [drop.reason for drop in drops] == [
        "segmentation of another time point or echo of the series"
    ]


def test_the_segments_of_a_real_file_are_those_that_highdicom_reads(shared_data):
    import highdicom

    from data_tools.readers.dicom_drawn import masks_of, open_drawn
    from data_tools.records import Drops
    from gmai_xtuner.core.imaging.dicom import header_of, open_dataset, stack_of

    folder = shared_data / "dicom_samples/dicomdirtests/77654033/CT2"
    stack = stack_of([header_of(open_dataset(path)) for path in sorted(folder.iterdir())])
    for path in sorted((shared_data / "dicom_seg_highdicom").glob("seg_image_ct*.dcm")):
        data = open_drawn(path)
        theirs = highdicom.seg.Segmentation.from_dataset(data).get_pixels_by_source_instance(
            [plane.instance for plane in stack.planes], assert_missing_frames_are_empty=True
        )
        ours = masks_of(data, stack.planes, stack, drops := Drops(), "")
        assert not drops.found
        assert any(mask.any() for _, mask in ours)
        for at, (_, mask) in enumerate(ours):
            assert np.array_equal(mask, theirs[..., at] > 0)


# --- label maps in other formats ---


def tilted() -> list[Dataset]:
    """Slices on an oblique grid, rows to the left and columns backwards, numbered from above."""
    turned = [np.cos(0.2), np.sin(0.2), 0, -np.sin(0.2), np.cos(0.2), 0]
    slices = axial(orientation=turned)
    return slices[::-1]


def nrrd_map(
    path: Path, values: np.ndarray, directions, origin, space="left-posterior-superior", **header
):
    """``values``: ``[i, j, k]``; directions are those of its axes."""
    known = {
        "space": space,
        "space directions": np.asarray(directions, float),
        "space origin": origin,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), values, known | header)


def as_map(slices: list[Dataset], at: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels ``[column, row, slice]`` with `region` in one slice, LPS directions and origin of the series."""
    slices = sorted(slices, key=lambda data: float(data.ImagePositionPatient[2]))
    values = np.zeros((6, 8, len(slices)), np.uint8)
    values[..., at] = region().T
    axes = np.array(slices[0].ImageOrientationPatient, float)
    return values, np.stack([axes[:3], axes[3:], [0, 0, 2]]), np.array([-10.0, -20, 0])


def flipped(values, directions, origin, axis):
    """The same voxels, stored the other way along one axis."""
    end = origin + directions[axis] * (values.shape[axis] - 1)
    turned = directions.copy()
    turned[axis] *= -1
    return np.flip(values, axis), turned, end


def in_ras(values, directions, origin):
    return values, directions * (-1, -1, 1), origin * (-1, -1, 1), "right-anterior-superior"


def save_nifti(path: Path, values, directions, origin):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = (directions * (-1, -1, 1)).T, origin * (-1, -1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.nifti(path, values, affine)


SLICER = {"Segment0_Name": "tumour", "Segment0_LabelValue": "1", "Segment0_Layer": "0"}
MAPS = {
    "labels": {"1": "tumour", "tumour": "tumour"},
    "masks": "a/seg.nrrd",
    "slices": {"axes": ["z"], "keep": "all"},
}
MAPS_OF_A_SERIES = {
    "as it is": lambda path, *m: nrrd_map(path, *m),
    "slices reversed": lambda path, *m: nrrd_map(path, *flipped(*m, 2)),
    "rows reversed": lambda path, *m: nrrd_map(path, *flipped(*m, 1)),
    "RAS": lambda path, *m: nrrd_map(path, *in_ras(*flipped(*m, 0))),
    "axes permuted": lambda path, v, d, o: nrrd_map(path, v.transpose(2, 0, 1), d[[2, 0, 1]], o),
    "cropped by 3D Slicer": lambda path, v, d, o: nrrd_map(
        path, v[1:, 2:, 1:3], d, o + [1, 2, 1] @ d, **SLICER
    ),
    "layered": lambda path, v, d, o: nrrd_map(
        path, np.stack([v, 0 * v]), [[np.nan] * 3, *d], o, kinds=["list", *["domain"] * 3], **SLICER
    ),
}  # fmt: skip


@pytest.mark.parametrize("slices", [axial, tilted])
@pytest.mark.parametrize("how", MAPS_OF_A_SERIES)
def test_a_label_map_lies_on_the_slice_that_it_was_drawn_in(tmp_path, how, slices):
    made_of = slices()
    (tmp_path / "a").mkdir()
    MAPS_OF_A_SERIES[how](tmp_path / "a/seg.nrrd", *as_map(made_of))
    masks, reasons, lost = found_in(tmp_path / "a", made_of, _root=tmp_path, **MAPS)
    assert next(iter(masks.values())).sum() == 6
    assert {key[1] for key in masks} == {2}
    if slices is axial:
        assert np.array_equal(next(iter(masks.values())), EXPECTED)
    assert (reasons, lost) == ([], set())


def shift(values, directions, origin, by):
    return values, directions, origin + by


DRIFT = (0, 2.15, 4.3, 6.45, 8.4, 10.3, 12.2, 14.1)
LOST_MAPS = {
    "half a slice off": (lambda *m: shift(*m, (0, 0, 1)), axial, {}, dicom.OTHER_GRID),
    "a voxel outside": (lambda *m: shift(*m, (0, 1, 0)), axial, {}, dicom.OTHER_GRID),
    "other spacing": (lambda v, d, o: (v, d * (1, 1, 1.5), o), axial, {}, dicom.OTHER_GRID),
    "drifting slices": (None, lambda: axial(DRIFT), {}, dicom.OTHER_GRID),
    "time points": (
        None,
        lambda: [s for time in (1, 2) for s in axial(TemporalPositionIdentifier=time)],
        {},
        dicom.MAP_OF_SEVERAL,
    ),
    "two series": (None, lambda: [*axial(), *axial(series="1.2.4")], {}, dicom.MAP_OF_SEVERAL),
    "of another case": (None, axial, {"masks": "b/seg.nrrd"}, dicom.NO_MAP),
    "a case that isn't known": (
        None,
        axial,
        {"masks": "{case}/seg.nrrd", "series": "x/{case}"},
        dicom.NO_MAP,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", LOST_MAPS)
@pytest.mark.parametrize("save", [nrrd_map, save_nifti])
def test_a_label_map_that_may_be_of_other_slices_is_lost_with_all_labels(tmp_path, how, save):
    change, slices, keys, reason = LOST_MAPS[how]
    made_of, suffix = slices(), "nrrd" if save is nrrd_map else "nii.gz"
    found = as_map(made_of if how == "drifting slices" else made_of[:4])
    if how == "drifting slices":
        found = found[0], np.diag([1, 1, DRIFT[-1] / 7]), found[2]
    (tmp_path / "a").mkdir()
    save(tmp_path / f"a/seg.{suffix}", *(change(*found) if change else found))
    keys = {**MAPS, **keys}
    keys["masks"] = keys["masks"].replace("nrrd", suffix)
    masks, reasons, lost = found_in(
        tmp_path / "a", made_of, _root=tmp_path, label="folder", **keys | {"labels": None}
    )
    assert all(label == "a" for label, _ in masks)
    assert reason in reasons
    assert lost == {ANYTHING}

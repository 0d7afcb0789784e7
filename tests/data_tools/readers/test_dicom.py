# SPDX-License-Identifier: Apache-2.0

"""DICOM files made here and real ones: grey levels, order, segmentations, contours, and nobody's name."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless

from data_tools.readers import dicom, volume
from data_tools.records import Drop, Sample
from tests import medical_files as made
from tests.data_tools.readers.sets import read_units

NAME, NUMBER, BIRTH = "Muster^Erika", "PAT-4711", "19610203"
SPACING, THICKNESS = (0.5, 0.75), 2.0


def options(root: Path, **keys) -> dicom.Options:
    known = {"name": "d", "reader": "dicom", "root": root, "licence": "MIT", "clean": "none"}
    return dicom.Options(**known | keys)


def read(of: dicom.Options) -> list[Sample | Drop]:
    samples, drops, _ = read_units(dicom, of)
    return [*drops, *samples]


def only(found: list) -> Sample:
    (sample,) = found
    assert isinstance(sample, Sample), sample
    return sample


def dataset(pixels: np.ndarray, **values) -> Dataset:
    """A CT image of somebody; ``values`` are set last."""
    known = {
        "StudyInstanceUID": "1.2.3",
        "FrameOfReferenceUID": "1.2.3.9",
        "PatientName": NAME,
        "PatientID": NUMBER,
        "PatientBirthDate": BIRTH,
        "PatientSex": "F",
        "BodyPartExamined": "CHEST",
        "InstitutionName": "Klinik Nord",
        "StudyDate": "20200101",
        "PatientComments": NAME,
        "RescaleSlope": 2,
        "RescaleIntercept": -1000,
    }
    return made.dicom(pixels.astype(np.int16), series="1.2.3.4", **known | values)


def save(path: Path, data: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(data, path)


def stack() -> np.ndarray:
    """Stored values ``[slice, row, column]`` without any symmetry."""
    return np.random.default_rng(1).integers(0, 1500, (6, 12, 10))


def series(root: Path, stored: np.ndarray, *, leave_out: tuple[int, ...] = ()) -> list[Dataset]:
    """An axial series, from the feet upwards, whose files' order says nothing."""
    found = []
    for index in np.random.default_rng(0).permutation(len(stored)):
        if index in leave_out:
            continue
        data = dataset(
            stored[index],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[-10, -20, 30 + THICKNESS * int(index)],
            PixelSpacing=list(SPACING),
            InstanceNumber=99 - int(index),
        )
        save(root / f"{NAME}_{len(found)}.dcm", data)
        found.append(data)
    return found


def test_a_series_is_its_nifti_twin(tmp_path):
    stored = stack()
    series(tmp_path / "dicom", stored)
    # Columns run to the left, rows to the back: minus in RAS+.
    affine = np.diag([-SPACING[1], -SPACING[0], THICKNESS, 1.0])
    affine[:3, 3] = (10, 20, 30)
    hounsfield = (stored * 2 - 1000).astype(np.float32).transpose(2, 1, 0)
    (tmp_path / "nifti").mkdir()
    nibabel.Nifti1Image(hounsfield, affine).to_filename(tmp_path / "nifti" / "a.nii.gz")
    window = {"level": 40, "width": 400}
    one = read(options(tmp_path / "dicom", window=window))
    twin = volume.Options(
        name="v", reader="volume", root=tmp_path / "nifti", licence="MIT", images="{case}.nii.gz",
        clean="none", window=window, modality="CT",
    )  # fmt: skip
    other, _, _ = read_units(volume, twin)
    assert len(one) == len(other) == 6 + 12 + 10
    for a, b in zip(one, other, strict=True):
        assert a.part == b.part
        assert np.array_equal(a.image, b.image)


def test_grey_levels_by_hand(tmp_path):
    # Hounsfield = 2 * stored - 1000; the window of PS3.3 C.11.2.1.2.1: 255 * ((x - 39.5) / 399 + 0.5)
    data = dataset(
        np.array([[420, 422, 520, 620, 0]]),
        WindowCenter=["40", "-600"],
        WindowWidth=["400", "1500"],
    )
    save(tmp_path / "a.dcm", data)
    hounsfield = np.array([-160, -156, 40, 240, -1000])
    for voi, center, width in ((0, 40, 400), (1, -600, 1500)):
        share = (hounsfield - (center - 0.5)) / (width - 1) + 0.5
        expected = np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)
        assert only(read(options(tmp_path, voi=voi))).image.tolist() == [expected.tolist()]
    data.PhotometricInterpretation = "MONOCHROME1"
    save(tmp_path / "a.dcm", data)
    turned = only(read(options(tmp_path)))
    share = (hounsfield - 39.5) / 399 + 0.5
    expected = 255 - np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(int)
    assert turned.image.tolist() == [expected.tolist()]


def test_nothing_that_says_who_it_is_leaves(tmp_path):
    series(tmp_path, stack())
    (tmp_path / "labels.csv").write_text(f"file,label\n{NUMBER},pneumonia\n")
    of = options(tmp_path, table="labels.csv", match="PatientID", files="*.dcm")
    found = read(of)
    assert {item.label for sample in found for item in sample.annotations} == {"pneumonia"}
    assert dict(found[0].attributes) == {"body part": "chest"}
    said = repr([(s.part, s.attributes, s.preprocessing) for s in found]).lower()
    for secret in ("Muster", "Erika", NUMBER, BIRTH, "Klinik", "2020", "1.2.3"):
        assert secret.lower() not in said
    assert len({sample.group for sample in found}) == 1


def test_a_table_of_pictures_says_nothing_of_their_neighbours(tmp_path):
    """A bleeding in one slice is told of that slice, not of the series."""
    slices = series(tmp_path, stack())
    uid = slices[2].SOPInstanceUID
    (tmp_path / "labels.csv").write_text(f"file,label\n{uid},bleeding\n")
    found = read(options(tmp_path, table="labels.csv", match="SOPInstanceUID", files="*.dcm"))
    assert len(found) == 6
    (told,) = [sample for sample in found if sample.annotations]
    assert [item.label for item in told.annotations] == ["bleeding"]
    assert told.image.shape == (12, 10)
    assert not told.part
    (tmp_path / "labels.csv").write_text("file,label\n1.2.3.4,bleeding\n")
    whole = read(options(tmp_path, table="labels.csv", match="SeriesInstanceUID", files="*.dcm"))
    axes = Counter(sample.part["axis"] for sample in whole if sample.annotations)
    assert axes == {"x": 10, "y": 12, "z": 6}


BOX = {"box": {key: key for key in ("x1", "y1", "x2", "y2")}}


@pytest.mark.parametrize(
    ("rows", "labels", "lost", "count"),
    [
        (
            "a.dcm,nodule,1,2,x,4\na.dcm,heart,1,2,3,4",
            [("heart", (1, 2, 3, 4))],
            ("nodule",),
            {"row of the table that can't be used": 1},
        ),
        # in shifted cells the label may be one that stands in the box
        (
            "a.dcm, giant,nodule,1,B,3\nb.dcm,nodule,1,2,3,4\nb.dcm,B,1,2,3,4",
            [],
            ("B", "giant", "nodule"),
            {"row of the table that can't be used": 1, "row of the table without an image": 1},
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_no_label_of_the_picture(tmp_path, rows, labels, lost, count):
    save(tmp_path / "a.dcm", dataset(stack()[0]))
    (tmp_path / "labels.csv").write_text(f"file,label,x1,y1,x2,y2\n{rows}\n")
    chosen = options(tmp_path, table="labels.csv", columns=BOX, files="*.dcm")
    (sample,), drops, lacking = read_units(dicom, chosen)
    assert Counter(drop.reason for drop in drops) == count
    assert [(item.label, item.box) for item in sample.annotations] == labels
    assert lacking == [lost]


def test_a_box_of_a_whole_series_is_left_out(tmp_path):
    """Slices are turned to the radiologist's view: the box isn't where it was."""
    series(tmp_path, stack())
    (tmp_path / "labels.csv").write_text(
        "file,label,x1,y1,x2,y2\n1.2.3.4,nodule,1,2,3,4\n1.2.3.4,thorax,,,,\n"
    )
    keys = {"table": "labels.csv", "match": "SeriesInstanceUID", "columns": BOX}
    found, (dropped,), lacking = read_units(dicom, options(tmp_path, files="*.dcm", **keys))
    assert dropped.reason == "box of the table for a whole series"
    assert {tuple(item.label for item in sample.annotations) for sample in found} == {("thorax",)}
    assert set(lacking) == {("nodule",)}


def test_only_allowed_attributes_leave(tmp_path):
    save(tmp_path / "a.dcm", dataset(stack()[0]))
    assert "sex" not in only(read(options(tmp_path))).attributes
    assert only(read(options(tmp_path, keep=["PatientSex"]))).attributes == {"sex": "female"}
    save(tmp_path / "a.dcm", dataset(stack()[0], BodyPartExamined="ERIKA CHEST"))
    assert not only(read(options(tmp_path))).attributes


def test_a_series_with_a_gap_is_cut_along_its_slices_alone(tmp_path):
    stored = stack()
    series(tmp_path, stored, leave_out=(3,))
    found = read(options(tmp_path, window="slice"))
    assert [sample.part["axis"] for sample in found] == ["z"] * 5
    assert found[0].preprocessing["slices"] == "uneven distances"
    dropped = read(options(tmp_path, slices={"axes": ["x"]}))
    assert [item.reason for item in dropped] == ["uneven or tilted series cut across its slices"]


def test_pictures_instead_of_a_volume(tmp_path):
    series(tmp_path, stack())
    assert len(read(options(tmp_path, volumes=False))) == 6


def test_rescale_and_window_of_functional_groups_hold_in_every_path(tmp_path):
    """Four frames of an enhanced CT: as frames, as a volume, and one by a table; each by hand."""
    stored = np.array([[[0, 1064, 2000, 1164]]] * 4) + np.arange(4)[:, None, None]
    stored = stored.astype(np.int16)
    shared = {
        "PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": -1024},
        "FrameVOILUTSequence": {"WindowCenter": 40, "WindowWidth": 400},
    }
    made.save(made.enhanced(stored, shared=shared), tmp_path / "e.dcm")
    hounsfield = stored.astype(float) - 1024
    share = ((hounsfield - 39.5) / 399 + 0.5).clip(0, 1)
    expected = np.floor(share * 255 + 0.5).astype(int)
    for keys in ({"volumes": False}, {"slices": {"axes": ["z"]}}):
        found = read(options(tmp_path, **keys))
        assert [sample.image.tolist() for sample in found] == expected.tolist()
        assert {s.preprocessing["window"] for s in found} == {
            "the file's window W 400 L 40, LINEAR"
        }
    made.save(made.enhanced(stored[:1], shared=shared), tmp_path / "one.dcm")
    one = dicom.read_picture(tmp_path / "one.dcm", source_file="one.dcm")
    assert one.image.tolist() == expected[0].tolist()


def test_burned_in_text_drops_the_picture(tmp_path):
    save(tmp_path / "a.dcm", dataset(stack()[0], BurnedInAnnotation="YES"))
    assert [item.reason for item in read(options(tmp_path))] == ["text burned into the picture"]
    assert only(read(options(tmp_path, burned_in="keep")))


def test_segmentation_objects_of_the_shared_series(shared_data, tmp_path):
    for path in (shared_data / "dicom_samples/dicomdirtests/77654033/CT2").iterdir():
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(shared_data / "dicom_seg_highdicom/seg_image_ct_binary_overlap.dcm", tmp_path)
    found = read(options(tmp_path))
    raw = pydicom.dcmread(tmp_path / "seg_image_ct_binary_overlap.dcm")
    # Pixels of each segment, frame by frame, as they are stored.
    frames = raw.pixel_array
    counts: Counter[str] = Counter()
    for frame, described in zip(frames, raw.PerFrameFunctionalGroupsSequence, strict=True):
        number = described.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        counts[str(raw.SegmentSequence[number - 1].SegmentLabel)] += int(frame.sum())
    got: Counter[str] = Counter()
    for sample in found:
        for item in sample.annotations:
            got[item.label] += int(item.mask.sum())
    assert got == counts
    assert len(counts) == 2


def test_a_segmentation_without_its_series(shared_data):
    found = read(options(shared_data / "dicom_seg_highdicom", files="*.dcm"))
    assert [item.reason for item in found] == ["segmentation without its series"] * 2


def test_all_shared_files_give_a_picture_or_a_reason(shared_data):
    found = read(options(shared_data / "dicom_samples", clean="sa-med2d"))
    reasons = Counter(item.reason for item in found if isinstance(item, Drop))
    pictures = [item for item in found if isinstance(item, Sample)]
    slices = [sample for sample in pictures if "axis" in sample.part]
    # 4 of CT2, which has a gap, and 5 of CT5N; the rest are single frames and a cine loop of 30.
    assert len(slices) == 9
    assert sum("frame" in sample.part for sample in pictures) == 30
    # 13 single files with a picture, 7 of MR700, whose directions all differ.
    assert len(pictures) == 9 + 30 + 13 + 7
    assert reasons["pixel data can't be read"] == 1  # MR_truncated
    assert reasons["DICOM object without a picture"] == 1  # rtdose
    for name in ("Doe", "Archibald", "CompressedSamples", "Lastname", "Firstname"):
        assert name not in repr([(s.attributes, s.preprocessing) for s in pictures])


def test_what_is_no_picture_is_counted_by_kind(tmp_path):
    for name in ("LICENSE", "notes.txt", "label.nrrd", "of.Erika"):
        (tmp_path / name).write_text("nothing")
    huge = dataset(stack()[0])
    huge.Rows = huge.Columns = 65535
    save(tmp_path / "huge.dcm", huge)
    save(tmp_path / "short.dcm", dataset(stack()[0], PixelData=b"\0\0"))
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "short.dcm").read_bytes()[:300])
    drops = read(options(tmp_path))
    assert Counter(item.reason for item in drops) == {
        "not a DICOM file (.txt)": 1,
        "not a DICOM file (.nrrd)": 1,
        "not a DICOM file (of another kind)": 2,
        "pixel data can't be read": 2,
        "unknown photometric interpretation": 1,
    }


def test_slices_whose_cosines_jitter_are_one_volume(tmp_path):
    for number, tilt in enumerate((0.012499, 0.012501) * 3):
        cosines = [1, 0, 0, 0, np.sqrt(1 - tilt**2), tilt]
        place = {"ImageOrientationPatient": cosines, "ImagePositionPatient": [0, 0, 3 * number]}
        data = dataset(stack()[number], PixelSpacing=[1, 1], **place)
        save(tmp_path / f"{number}.dcm", data)
    found = read(options(tmp_path, slices={"axes": ["z"]}))
    assert [sample.part["slice"] for sample in found] == list(range(6))


def test_a_copy_of_a_slice_is_left_out(tmp_path):
    series(tmp_path, stack())
    first = sorted(tmp_path.iterdir())[0]
    shutil.copy(first, tmp_path / f"{first.stem} (1).dcm")
    dropped, *found = read(options(tmp_path, slices={"axes": ["z"]}))
    assert dropped.reason == "copy of a file of the same series"
    assert [sample.part["slice"] for sample in found] == list(range(6))
    # the same number, but not the same bytes: which of them is right isn't known
    other = pydicom.dcmread(first)
    other.InstanceNumber = 5
    save(tmp_path / f"{first.stem} (1).dcm", other)
    assert [item.reason for item in read(options(tmp_path))] == [
        "series with two slices at one place"
    ]


def test_nothing_is_cut_across_the_slices_of_a_tilted_gantry(tmp_path):
    """Each slice is shifted by tan(20 degrees) of its height."""
    for number in range(6):
        sine, cosine = np.sin(np.radians(20)), np.cos(np.radians(20))
        place = {
            "ImageOrientationPatient": [1, 0, 0, 0, cosine, -sine],
            "ImagePositionPatient": [0, 0, 3 * number],
        }
        save(tmp_path / f"{number}.dcm", dataset(stack()[number], PixelSpacing=[1, 1], **place))
    assert [sample.part["axis"] for sample in read(options(tmp_path))] == ["z"] * 6
    (dropped,) = read(options(tmp_path, slices={"axes": ["x"]}))
    assert dropped.reason == "uneven or tilted series cut across its slices"


def test_no_damage_ends_a_job(tmp_path):
    """Random bytes of real files, compressed and not, and of their headers."""
    draw = np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    names = ("CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "rtstruct.dcm")
    for name in names:
        whole = Path(get_testdata_file(name, download=False)).read_bytes()
        for number in range(25):
            damaged = bytearray(whole)
            end = len(whole) if number % 2 else min(len(whole), 3000)
            for at in draw.integers(132, end, 4):
                damaged[at] = draw.integers(256)
            (tmp_path / "a.dcm").write_bytes(damaged)
            for found in read(options(tmp_path)):
                reasons["image" if isinstance(found, Sample) else found.reason] += 1
    assert {"image", "DICOM file that is damaged", "pixel data can't be read"} <= set(reasons)


def test_a_changed_type_of_a_value_drops_its_file_alone(tmp_path):
    save(tmp_path / "good.dcm", dataset(stack()[0]))
    save(tmp_path / "bad.dcm", dataset(stack()[1], Modality="CT"))
    bad = (tmp_path / "bad.dcm").read_bytes()
    # (0028,0002) SamplesPerPixel US -> a type that there isn't
    (tmp_path / "bad.dcm").write_bytes(bad.replace(b"\x28\0\2\0US", b"\x28\0\2\0Q\xf3"))
    dropped, sample = read(options(tmp_path))
    assert isinstance(sample, Sample)
    assert isinstance(dropped, Drop)


def test_a_row_of_the_table_without_an_image_is_counted(tmp_path):
    for name in "ab":
        save(tmp_path / f"x/{name}.dcm", dataset(stack()[ord(name) - 97]))
    rows = ["file,label", "x\\a.dcm,mass", "./x/b.dcm,cyst", f"{NAME}.dcm,nodule"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = read(options(tmp_path, files="*.dcm", table="t.csv"))
    assert sorted(one.annotations[0].label for one in found if isinstance(one, Sample)) == [
        "cyst",
        "mass",
    ]
    (drop,) = (one for one in found if isinstance(one, Drop))
    assert (drop.reason, drop.detail) == ("row of the table without an image", "line 4")


def test_a_sign_that_pixels_have_and_their_header_denies_drops_the_picture(tmp_path):
    data = made.dicom(np.linspace(-500, 500, 1024).reshape(32, 32).astype(np.int16))
    data.compress(JPEG2000Lossless)
    save(tmp_path / "a.dcm", data)
    assert only(read(options(tmp_path)))
    data.PixelRepresentation = 0
    save(tmp_path / "a.dcm", data)
    (drop,) = read(options(tmp_path))
    assert drop.reason == "pixel data that contradict their header"

# SPDX-License-Identifier: Apache-2.0

"""Volumes with label maps: boxes against scikit-image on the raw array, orientation, pairing, bad files."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from skimage.measure import label as components
from skimage.measure import regionprops

from data_tools.readers import nnunet, volume
from data_tools.readers.volume import window_for
from data_tools.records import Drop, Sample
from tests.data_tools.readers.sets import read_units, regions_of

KEYS = {"name": "v", "licence": "MIT", "modality": "CT", "clean": "none"}


def head(seed: int = 0, shape=(20, 24, 12)) -> tuple[np.ndarray, np.ndarray]:
    """A volume without any symmetry and a label map of two structures in several pieces."""
    random = np.random.default_rng(seed)
    voxels = random.normal(0, 300, shape).astype(np.float32)
    labels = np.zeros(shape, dtype=np.uint8)
    labels[2:7, 3:9, 2:10] = 1
    # touches the first by an edge: one component in RAS+ slices of 8 neighbours
    labels[7:9, 9:12, 4:6] = 1
    labels[12:18, 5:20, 3:8] = 2
    labels[14:15, 22:24, 3] = 2
    return voxels, labels


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)


def options(root: Path, **keys) -> volume.Options:
    values = KEYS | {"images": "{case}_ct.nii.gz", "masks": "{case}_seg.nii.gz"} | keys
    return volume.Options(reader="volume", root=root, **values)


def read(of, module=volume) -> tuple[list[Sample], list[Drop]]:
    samples, drops, _ = read_units(module, of)
    return samples, drops


def samples_of(found) -> list[Sample]:
    samples, drops = found
    assert drops == []
    return samples


def check_the_same(one: list[Sample], other: list[Sample], names: dict[str, str] | None = None):
    """The images, parts and masks of two sources are one; ``names`` are labels that the other has."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.part == b.part
        assert np.array_equal(a.image, b.image)
        for left, right in zip(a.annotations, b.annotations, strict=True):
            assert (names or {}).get(left.label, left.label) == right.label
            assert np.array_equal(left.mask, right.mask)


def expected_boxes(plane: np.ndarray, value: int) -> list[tuple[int, ...]]:
    """Half-open (x1, y1, x2, y2) of each 8-connected piece, by scikit-image alone."""
    found = regionprops(components(plane == value, connectivity=2))
    return sorted((c1, r1, c2, r2) for r1, c1, r2, c2 in (item.bbox for item in found))


def boxes_of(sample: Sample, name: str) -> list[tuple[int, ...]]:
    height, width = sample.image.shape
    found, dropped = regions_of(sample, (width, height))
    assert not dropped
    return sorted(tuple(item.box) for item in found if item.name == name)


def shown(array: np.ndarray, axis: str, index: int) -> np.ndarray:
    """A slice of a RAS+ array the way radiologists look at it, written down here once more."""
    if axis == "z":  # front on top, the patient's right on the left
        return np.flipud(np.fliplr(array[:, :, index].T))
    if axis == "y":  # head on top, the patient's right on the left
        return np.flipud(np.fliplr(array[:, index, :].T))
    return np.flipud(np.fliplr(array[index, :, :].T))  # head on top, front on the left


def test_boxes_are_those_of_the_array(tmp_path):
    voxels, labels = head()
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    save(tmp_path / "a_ct.nii.gz", voxels, affine)
    save(tmp_path / "a_seg.nii.gz", labels, affine)
    found = samples_of(read(options(tmp_path)))
    assert {sample.part["axis"] for sample in found} == {"x", "y", "z"}
    checked = 0
    for sample in found:
        plane = shown(labels, sample.part["axis"], sample.part["slice"])
        assert sample.image.shape == plane.shape
        for value in (1, 2):
            expected = expected_boxes(plane, value)
            assert boxes_of(sample, str(value)) == expected
            checked += len(expected)
    held = [np.flatnonzero(labels.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    assert len(found) == sum(map(len, held))
    assert checked > 50


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAL", "RAS"])
def test_the_same_pictures_whatever_the_order_of_the_axes(tmp_path, axes):
    voxels, labels = head()
    affine = np.array([[0.8, 0, 0, -5], [0, 0.8, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    for folder, codes in (("ras", None), ("other", turn)):
        for name, array in (("ct", voxels), ("seg", labels)):
            image = nibabel.Nifti1Image(array, affine)
            image = image if codes is None else image.as_reoriented(codes)
            (tmp_path / folder).mkdir(exist_ok=True)
            image.to_filename(tmp_path / folder / f"a_{name}.nii.gz")
    one, other = (samples_of(read(options(tmp_path / name))) for name in ("ras", "other"))
    check_the_same(one, other)
    assert other[0].preprocessing["stored as"] == axes


def test_nrrd_is_its_nifti_twin(tmp_path):
    voxels, labels = head()
    affine = np.diag([0.8, 0.9, 3.0, 1.0])
    save(tmp_path / "nii" / "a_ct.nii.gz", voxels, affine)
    save(tmp_path / "nii" / "a_seg.nii.gz", labels, affine)
    (tmp_path / "nrrd").mkdir()
    for name, array in (("ct", voxels), ("seg", labels)):
        image = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
        image.SetSpacing((0.8, 0.9, 3.0))
        # LPS axes that run to the right and to the front
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        SimpleITK.WriteImage(image, str(tmp_path / "nrrd" / f"a_{name}.nrrd"))
    one = samples_of(read(options(tmp_path / "nii")))
    keys = {"images": "{case}_ct.nrrd", "masks": "{case}_seg.nrrd"}
    check_the_same(one, samples_of(read(options(tmp_path / "nrrd", **keys))))


def test_the_spleen_of_the_shared_volume(shared_data):
    root = shared_data / "spleen_ct_nifti"
    images = [path for path in root.rglob("*.nii.gz") if "derivatives" not in path.as_posix()]
    masks = [path for path in root.rglob("*.nii.gz") if "derivatives" in path.as_posix()]
    (image,), (mask,) = images, masks
    keys = {
        "images": image.relative_to(root).as_posix(),
        "masks": mask.relative_to(root).as_posix(),
    }
    found = samples_of(read(options(root, slices={"axes": ["z"]}, **keys)))
    labels = np.asarray(nibabel.as_closest_canonical(nibabel.load(mask)).dataobj)
    assert len(found) == np.count_nonzero(labels.any(axis=(0, 1))) > 5
    for sample in found:
        plane = shown(labels, "z", sample.part["slice"])
        assert boxes_of(sample, "1") == expected_boxes(plane, 1)
        assert sample.preprocessing["window"] == "soft tissue window, -160 to 240"


def bad(tmp_path: Path, **keys) -> tuple[str, str]:
    samples, (found,) = read(options(tmp_path, **keys))
    assert samples == []
    return found.reason, found.detail


def test_files_that_are_left_out(tmp_path):
    voxels, labels = head()
    affine = np.eye(4)
    path = tmp_path / "a_ct.nii.gz"
    save(path, voxels, affine)
    assert bad(tmp_path)[0] == "image without a mask"
    moved = affine.copy()
    moved[0, 3] = 0.5
    save(tmp_path / "a_seg.nii.gz", labels, moved)
    assert bad(tmp_path)[0] == "mask on another grid than its volume"
    save(tmp_path / "a_seg.nii.gz", np.vstack([labels, labels]), affine)
    assert bad(tmp_path)[0] == "mask on another grid than its volume"
    save(tmp_path / "a_seg.nii.gz", np.zeros_like(labels), affine)
    assert bad(tmp_path)[0] == "empty label map"
    save(tmp_path / "a_seg.nii.gz", labels / np.float32(2), affine)
    assert bad(tmp_path)[0] == "label map with fractions"
    save(tmp_path / "a_seg.nii.gz", labels, affine)
    assert bad(tmp_path, max_voxels=100)[0] == "volume is too large"
    save(path, np.stack([voxels, voxels], axis=-1), affine)
    assert bad(tmp_path)[0] == "volume of several channels"
    save(path, np.full_like(voxels, np.nan), affine)
    assert bad(tmp_path)[0] == "volume without a finite voxel"
    path.write_bytes(path.read_bytes()[:200])
    assert bad(tmp_path)[0] == "volume can't be read"


def test_windows_of_a_job(tmp_path):
    values = np.array([[-1000, -160, -159, 40, 240, 3000]], dtype=np.int16)
    for window in ("soft tissue", {"level": 40, "width": 400}, [-160, 240]):
        scale = window_for(options(tmp_path, window=window).window, values, modality="CT")
        assert scale.apply(values).tolist() == [[0, 0, 1, 128, 255, 255]]
    for window in ({"level": 0, "width": 0}, [2, 1], "bones"):
        with pytest.raises(ValueError, match="window"):
            options(tmp_path, window=window)


def test_a_few_infinite_voxels_are_set_and_said(tmp_path):
    voxels, labels = head()
    voxels[0, 0, 0] = np.inf
    save(tmp_path / "a_ct.nii.gz", voxels, np.eye(4))
    save(tmp_path / "a_seg.nii.gz", labels, np.eye(4))
    found = samples_of(read(options(tmp_path)))
    assert found[0].preprocessing["not finite"] == "1 voxels set to the smallest value"


def test_a_channel_is_chosen(tmp_path):
    voxels, labels = head()
    save(tmp_path / "a_seg.nii.gz", labels, np.eye(4))
    save(tmp_path / "a_ct.nii.gz", np.stack([np.zeros_like(voxels), voxels], axis=-1), np.eye(4))
    four = samples_of(read(options(tmp_path, channel=1)))
    save(tmp_path / "a_ct.nii.gz", voxels, np.eye(4))
    three = samples_of(read(options(tmp_path)))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(four, three, strict=True))


def test_a_binary_file_for_each_label(tmp_path):
    voxels, labels = head()
    save(tmp_path / "a" / "ct.nii.gz", voxels, np.eye(4))
    save(tmp_path / "a" / "seg" / "liver.nii.gz", (labels == 1).astype(np.uint8), np.eye(4))
    save(tmp_path / "a" / "seg" / "spleen.nii.gz", (labels > 0).astype(np.uint8), np.eye(4))
    keys = {"images": "{case}/ct.nii.gz", "masks": "{case}/seg/{label}.nii.gz"}
    found = samples_of(read(options(tmp_path, slices={"axes": ["z"]}, **keys)))
    for sample in found:
        masks = {item.label: item.mask for item in sample.annotations}
        plane = shown(labels, "z", sample.part["slice"])
        for name, expected in (("liver", plane == 1), ("spleen", plane > 0)):
            assert np.array_equal(masks.get(name, np.zeros_like(expected)), expected)


def test_labels_take_some_codes_of_a_map_and_the_others_are_known_to_be_there(tmp_path):
    voxels, labels = head()
    labels[labels == 2] = 41
    save(tmp_path / "a_ct.nii.gz", voxels, np.eye(4))
    save(tmp_path / "a_seg.nii.gz", labels, np.eye(4))
    of = options(tmp_path, labels={"1": "liver"}, slices={"axes": ["z"]})
    samples, drops, incomplete = read_units(volume, of)
    held = np.flatnonzero((labels == 1).any(axis=(0, 1)))
    assert [sample.part["slice"] for sample in samples] == held.tolist()
    assert {item.label for sample in samples for item in sample.annotations} == {"1"}
    assert set(incomplete) == {("41",)}
    assert [(drop.reason, drop.detail) for drop in drops] == [
        ("unknown label", "'41' not in the job's `labels`")
    ]
    assert bad(tmp_path, labels={"7": "x"}) == (
        "unknown label",
        "'1', '41' not in the job's `labels`",
    )


def test_a_map_that_was_cut_out_and_a_segmentation_by_3d_slicer(tmp_path):
    voxels, labels = head()
    save(tmp_path / "a_ct.nii.gz", voxels, np.eye(4))
    moved = np.eye(4)
    moved[:3, 3] = (2, 3, 2)
    save(tmp_path / "a_seg.nii.gz", labels[2:, 3:, 2:], moved)
    whole = options(tmp_path, slices={"axes": ["z"]})
    samples, (drop,), incomplete = read_units(volume, whole)
    for sample in samples:
        plane = shown(labels, "z", sample.part["slice"])
        assert boxes_of(sample, "1") == expected_boxes(plane, 1)
    assert set(incomplete) == {("1", "2")}
    assert drop.reason.startswith("label map of a part of its volume")
    image = SimpleITK.GetImageFromArray(labels[2:, 3:, 2:].transpose(2, 1, 0))
    image.SetOrigin((-2, -3, 2))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    for number, name in enumerate(("liver", "tumour")):
        for key, text in {"Name": name, "LabelValue": str(number + 1), "Layer": "0"}.items():
            image.SetMetaData(f"Segment{number}_{key}", text)
    SimpleITK.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    found = samples_of(read(options(tmp_path, masks="{case}.seg.nrrd", slices={"axes": ["z"]})))
    check_the_same(samples, found, {"1": "liver", "2": "tumour"})


def test_a_file_of_one_label_or_of_a_named_set_that_was_cut_out_says_nothing_of_the_rest(tmp_path):
    voxels, labels = head()
    moved = np.eye(4)
    moved[:3, 3] = (2, 3, 2)
    save(tmp_path / "imagesTr/a_0000.nii.gz", voxels, np.eye(4))
    for name in ("liver/a", "labelsTr/a"):
        save(tmp_path / f"{name}.nii.gz", labels[2:, 3:, 2:], moved)
    keys = {"images": "imagesTr/{case}_0000.nii.gz", "masks": "{label}/{case}.nii.gz"}
    of = options(tmp_path, slices={"axes": ["z"]}, labels={"liver": "liver"}, **keys)
    assert set(read_units(volume, of)[2]) == {("labelsTr", "liver")}
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "cyst": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))
    of = nnunet.Options(reader="nnunet", root=tmp_path, slices={"axes": ["z"]}, **KEYS)
    assert set(read_units(nnunet, of)[2]) == {("cyst", "liver")}


def test_masks_of_several_channels(tmp_path):
    voxels, labels = head()
    save(tmp_path / "a_ct.nii.gz", np.stack([voxels, voxels], axis=-1), np.eye(4))
    save(tmp_path / "a_seg.nii.gz", np.stack([labels * 0, labels], axis=-1), np.eye(4))
    assert samples_of(read(options(tmp_path, channel=1)))
    save(tmp_path / "a_seg.nii.gz", np.stack([labels] * 3, axis=-1), np.eye(4))
    reason, detail = bad(tmp_path, channel=1)
    assert (reason, "{label}" in detail) == ("mask of several channels", True)


def set_of_cases(root: Path, folder: str, suffix: str) -> np.ndarray:
    voxels, labels = head()
    save(root / "imagesTr" / f"case1{suffix}.nii.gz", voxels, np.eye(4))
    save(root / folder / "case1.nii.gz", labels, np.eye(4))
    return labels


@pytest.mark.parametrize("sign", ["/", "\\"])
def test_decathlon(tmp_path, sign):
    labels = set_of_cases(tmp_path, "labelsTr", "")
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [{key: f".{sign}{key}sTr{sign}case1.nii.gz" for key in ("image", "label")}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    of = nnunet.Options(reader="decathlon", root=tmp_path, slices={"axes": ["z"]}, **KEYS)
    for sample in samples_of(read(of, nnunet)):
        plane = shown(labels, "z", sample.part["slice"])
        assert boxes_of(sample, "liver") == expected_boxes(plane, 1)
        assert boxes_of(sample, "cancer") == expected_boxes(plane, 2)
        assert sample.source_file == "imagesTr/case1.nii.gz"


def test_nnunet_regions_overlap_and_ignored_voxels_drop_their_slices(tmp_path):
    labels = set_of_cases(tmp_path, "labelsTr", "_0000")
    labels[0, 0, 9] = 3
    save(tmp_path / "labelsTr" / "case1.nii.gz", labels, np.eye(4))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    of = nnunet.Options(reader="nnunet", root=tmp_path, slices={"axes": ["z"]}, **KEYS)
    samples, dropped = read(of, nnunet)
    assert [item.reason for item in dropped] == ["slice with voxels marked as ignored"]
    for sample in samples:
        plane = shown(labels, "z", sample.part["slice"])
        masks = {item.label: item.mask for item in sample.annotations}
        assert np.array_equal(masks["whole"], np.isin(plane, (1, 2)))
        assert np.array_equal(masks.get("core", np.zeros_like(plane, bool)), plane == 2)


def test_nothing_is_cut_across_the_slices_of_a_sheared_volume(tmp_path):
    """As dcm2niix and others store a tilted gantry: the third axis leans towards the second."""
    voxels, labels = head()
    affine = np.eye(4)
    affine[1, 2] = 0.36
    save(tmp_path / "a_ct.nii.gz", voxels, affine)
    save(tmp_path / "a_seg.nii.gz", labels, affine)
    found = samples_of(read(options(tmp_path)))
    assert {sample.part["axis"] for sample in found} == {"y", "z"}  # no shear in either
    samples, drops = read(options(tmp_path, slices={"axes": ["x"]}))
    assert (samples, [drop.reason for drop in drops]) == ([], [volume.FLAWED_CUT])


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_flat_file_is_shown_as_stored_and_no_plane_is_claimed(tmp_path, suffix):
    voxels, labels = (array[:, :, 4] for array in head())
    for name, array in (("ct", voxels), ("seg", labels)):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), tmp_path / f"a_{name}{suffix}")
    keys = {"images": f"{{case}}_ct{suffix}", "masks": f"{{case}}_seg{suffix}"}
    (sample,) = samples_of(read(options(tmp_path, **keys)))
    assert (sample.part, "orientation" in sample.preprocessing) == ({}, False)
    assert boxes_of(sample, "1") == expected_boxes(labels, 1)

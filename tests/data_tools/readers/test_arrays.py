# SPDX-License-Identifier: Apache-2.0

import zipfile

import h5py
import numpy as np
import pytest
import tifffile

from data_tools.readers import arrays
from tests.data_tools.readers.sets import read_all, reasons

IMAGES = np.arange(4 * 30 * 40, dtype=np.uint32).reshape(4, 30, 40).astype(np.uint8)
MASKS = np.zeros((4, 30, 40), dtype=np.uint8)
MASKS[:, 3:9, 4:20], MASKS[2, 10:20, 2:8] = 1, 7


def labels_of(samples):
    return [[annotation.label for annotation in sample.annotations] for sample in samples]


def check_dropped(root, reason, **keys):
    samples, drops = read_all(arrays, root, **keys)
    assert (samples, list(reasons(drops))) == ([], [reason])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_medmnist(tmp_path, save):
    colour = np.stack([IMAGES] * 3, axis=-1)
    parts = {"train_images": IMAGES, "train_labels": np.array([[0], [3], [1], [0]])}
    parts |= {"val_images": colour, "val_labels": np.eye(4, 5, dtype=np.uint8)}
    save(tmp_path / "m.npz", **parts)
    keys = {"image_key": "{split}_images", "label_key": "{split}_labels"}
    samples, drops = read_all(arrays, tmp_path, images="{name}.npz", **keys)
    assert labels_of(samples) == [["0"], ["3"], ["1"], ["0"], ["0"], ["1"], ["2"], ["3"]]
    assert [dict(sample.part) for sample in samples[3:5]] == [
        {"array": "train_images", "index": 3},
        {"array": "val_images", "index": 0},
    ]
    assert all(np.array_equal(s.image, i) for s, i in zip(samples, [*IMAGES, *colour], strict=True))
    assert len({sample.group for sample in samples}) == 8
    assert drops == []


@pytest.mark.parametrize("kind", ["npz", "npy", "h5", "tif", "fortran"])
def test_medsam_and_the_same_arrays_in_other_files(tmp_path, kind):
    keys = {"images": "imgs/{case}." + kind, "masks": "gts/{case}." + kind}
    (tmp_path / "imgs").mkdir()
    (tmp_path / "gts").mkdir()
    if kind in ("npz", "h5"):
        keys = {"images": "imgs/{case}." + kind, "image_key": "a/imgs", "mask_key": "a/gts"}
    if kind == "npz":
        np.savez(tmp_path / "imgs/c.npz", **{"a/imgs": IMAGES, "a/gts": MASKS})
    elif kind == "h5":
        with h5py.File(tmp_path / "imgs/c.h5", "w") as file:
            file["a/imgs"], file["a/gts"] = IMAGES, MASKS
    elif kind == "tif":
        tifffile.imwrite(tmp_path / "imgs/c.tif", IMAGES, photometric="minisblack")
        tifffile.imwrite(tmp_path / "gts/c.tif", MASKS, photometric="minisblack")
    else:
        order = np.asfortranarray if kind == "fortran" else np.ascontiguousarray
        keys = {"images": "imgs/{case}.npy", "masks": "gts/{case}.npy"}
        for folder, array in (("imgs", IMAGES), ("gts", MASKS)):
            np.save(tmp_path / folder / "c.npy", order(array))
    samples, drops = read_all(arrays, tmp_path, **keys)
    assert labels_of(samples) == [["1"], ["1"], ["1", "7"], ["1"]]
    for sample, image, mask in zip(samples, IMAGES, MASKS, strict=True):
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.annotations[0].mask, mask == 1)
    assert {sample.group for sample in samples} == {samples[0].source_file}
    assert drops == []


def test_deep_levels_axes_and_a_window(tmp_path):
    deep = np.moveaxis(np.stack([IMAGES[0].astype(np.float32) - 100] * 3), 0, 0)
    np.save(tmp_path / "liver_1.npy", deep)
    keys = {"images": "{label}_{n:d}.npy", "axes": "CHW"}
    (sample,), _ = read_all(arrays, tmp_path, **keys)
    assert (sample.image.shape, labels_of([sample])) == ((30, 40, 3), [["liver"]])
    assert sample.preprocessing == {"levels": "float32 by their own range"}
    (sample,), _ = read_all(arrays, tmp_path, window=[-100, 0], **keys)
    assert (sample.image.dtype, sample.image.max()) == (np.uint8, 255)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"imgs": IMAGES[:3], "gts": MASKS}, "arrays of different lengths"),
        ({"imgs": IMAGES, "gts": MASKS[:, :9]}, "mask of another size than its image"),
        ({"imgs": IMAGES, "gts": MASKS / 2}, "label map with fractions"),
        ({"imgs": IMAGES}, "no such array"),
        ({"gts": MASKS}, "no such array"),
        ({"imgs": IMAGES[..., None, None], "gts": MASKS}, "array of another number of axes"),
        ({"imgs": IMAGES.astype(object), "gts": MASKS}, "array that can't be read"),
        ({"imgs": IMAGES.astype("U3"), "gts": MASKS}, "array of no numbers"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, parts, reason):
    np.savez(tmp_path / "c.npz", **parts)
    check_dropped(tmp_path, reason, images="{case}.npz", image_key="imgs", mask_key="gts")


def npy(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        npy("(1000000, 1000, 1000)"),
        npy("(3, 30, 40)", b"\0" * 3599),
        npy("(-1, 30, 40)", b"\0" * 3600),
        npy("(0, 30, 40)"),
        npy("__import__('os')"),
        b"\x93NUMPY\3\0",
        b"",
    ],
)
def test_what_a_header_promises_is_held_against_the_file(tmp_path, content):
    (tmp_path / "liver.npy").write_bytes(content)
    check_dropped(tmp_path, "array that can't be read", images="{label}.npy")
    with zipfile.ZipFile(tmp_path / "liver.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content)
    check_dropped(tmp_path, "array that can't be read", images="{label}.npz")


def test_no_hdf5_file_leads_to_another(tmp_path):
    (tmp_path / "secret").write_bytes(IMAGES.tobytes())
    with h5py.File(tmp_path / "other", "w") as file:
        file["a"] = IMAGES
    with h5py.File(tmp_path / "liver.h5", "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "other"), "a")
        outside = [(str(tmp_path / "secret"), 0, IMAGES.nbytes)]
        file.create_dataset("raw", IMAGES.shape, IMAGES.dtype, external=outside)
    for key, reason in (("link", "no such array"), ("raw", "array that can't be read")):
        check_dropped(tmp_path, reason, images="{label}.h5", image_key=key)


def test_a_row_may_not_be_larger_than_the_job_says(tmp_path):
    np.savez_compressed(tmp_path / "liver.npz", a=np.zeros((2, 2000, 2000), dtype=np.uint8))
    check_dropped(tmp_path, "array is too large", images="{label}.npz", max_bytes=10**6)


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    with h5py.File(tmp_path / "liver.h5", "w") as file:
        file.create_dataset("a", (2, 20_000, 20_000), np.uint8, chunks=(1, 1000, 1000))
    check_dropped(tmp_path, "image is too large", images="{label}.h5")


def test_a_stack_whose_white_is_0_is_not_shown_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "liver_1.tif", IMAGES, photometric="miniswhite")
    check_dropped(tmp_path, "array that can't be read", images="{label}_{n:d}.tif")

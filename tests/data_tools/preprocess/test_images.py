from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_tools.preprocess.images import BadImage, store_image

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def stored_pixels(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / name))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_plain_files_are_kept_byte_for_byte(tmp_path, suffix):
    file = saved(tmp_path / f"a{suffix}", NOISE)
    stored = store_image(file, tmp_path / "out")
    assert (stored.width, stored.height) == (30, 20)
    assert stored.path == f"{stored.pixels[:2]}/{Path(stored.path).name}"
    assert stored.path.endswith(suffix)
    assert (tmp_path / "out" / stored.path).read_bytes() == file.read_bytes()


def test_text_in_a_png_is_taken_out_and_nothing_else(tmp_path):
    plain = saved(tmp_path / "plain.png", NOISE)
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Doe^John")
    info.add_itxt("Comment", "born 1950")
    named = saved(tmp_path / "named.png", NOISE, pnginfo=info, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert b"Doe^John" in named.read_bytes()
    stored = store_image(named, tmp_path / "out")
    assert (tmp_path / "out" / stored.path).read_bytes() == plain.read_bytes()
    assert stored == store_image(plain, tmp_path / "out")


def test_comments_and_exif_in_a_jpeg_are_taken_out_and_the_coded_pixels_stay(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "Doe^John"
    named = saved(tmp_path / "named.jpg", NOISE, exif=exif, comment=b"born 1950", quality=90)
    stored = store_image(named, tmp_path / "out")
    data = (tmp_path / "out" / stored.path).read_bytes()
    assert b"Doe^John" not in data
    assert b"born 1950" not in data
    assert data == saved(tmp_path / "plain.jpg", NOISE, quality=90).read_bytes()


def test_the_same_pixels_have_one_hash_whatever_the_file(tmp_path):
    as_file = store_image(saved(tmp_path / "a.png", NOISE), tmp_path / "out")
    as_bmp = store_image(saved(tmp_path / "a.bmp", NOISE), tmp_path / "out")
    as_array = store_image(NOISE, tmp_path / "out")
    other_bytes = store_image(saved(tmp_path / "b.png", NOISE, compress_level=0), tmp_path / "out")
    assert as_file.pixels == as_bmp.pixels == as_array.pixels == other_bytes.pixels
    assert as_bmp == as_array
    # which of two files of the same pixels is kept must not depend on which comes first
    assert as_file.path != other_bytes.path
    wider = store_image(NOISE.reshape(30, 20, 3), tmp_path / "out")
    assert wider.pixels != as_array.pixels


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        # values that span half of the 16 bits keep the high byte
        ([[0, 256, 32768, 65535]], [[0, 1, 128, 255]]),
        # 12 bit with an offset: own window
        ([[1000, 1000, 3000, 5000]], [[0, 0, 128, 255]]),
    ],
)
def test_16_bit_grey(tmp_path, levels, expected):
    file = saved(tmp_path / "a.png", np.array(levels, dtype=np.uint16))
    stored = store_image(file, tmp_path / "out")
    assert stored_pixels(tmp_path / "out", stored.path).tolist() == expected


def test_16_bit_colour_shares_one_window(tmp_path):
    import cv2

    rgb = np.zeros((1, 2, 3), dtype=np.uint16)
    rgb[0, 0], rgb[0, 1] = (1000, 2000, 3000), (1000, 1000, 1000)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[:, :, ::-1])
    stored = store_image(tmp_path / "a.png", tmp_path / "out")
    found = stored_pixels(tmp_path / "out", stored.path)
    assert found.tolist() == [[[0, 128, 255], [0, 0, 0]]]


def test_floats_are_windowed_and_nan_is_refused(tmp_path):
    levels = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    stored = store_image(saved(tmp_path / "a.tif", levels), tmp_path / "out")
    assert stored_pixels(tmp_path / "out", stored.path).tolist() == [[0, 128, 255]]
    levels[0, 0] = np.nan
    with pytest.raises(BadImage, match="NaN"):
        store_image(saved(tmp_path / "b.tif", levels), tmp_path / "out")


def test_exif_rotation_is_applied_and_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    file = saved(tmp_path / "a.png", NOISE, exif=exif)
    stored = store_image(file, tmp_path / "out")
    assert stored.turned
    assert (stored.width, stored.height) == (20, 30)
    assert (stored_pixels(tmp_path / "out", stored.path) == np.rot90(NOISE, -1)).all()


def test_transparency_lies_over_black(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8)
    stored = store_image(saved(tmp_path / "a.png", rgba), tmp_path / "out")
    found = stored_pixels(tmp_path / "out", stored.path)
    assert found.tolist() == [[[200, 100, 50], [0, 0, 0]]]


def test_white_is_zero_becomes_black_is_zero(tmp_path):
    levels = np.array([[0, 65535]], dtype=np.uint16)
    saved(tmp_path / "a.tif", levels, tiffinfo={262: 0})
    stored = store_image(tmp_path / "a.tif", tmp_path / "out")
    assert stored_pixels(tmp_path / "out", stored.path).tolist() == [[255, 0]]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def stack() -> bytes:
    buffer = io.BytesIO()
    pages = [Image.fromarray(NOISE[:, :, i]) for i in range(3)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE.repeat(20, axis=0)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is truncated"),
        (b"hello", "image can't be read"),
        (png()[:-300], "image is truncated"),
        (jpeg()[:-3000], "image is truncated"),
        (png()[:30], "image"),
        (bomb(60_000, 60_000), "image is too large"),
        (bomb(10_000, 10_000), "image is truncated"),
        (stack(), "image is of an unsupported kind"),
    ],
)
def test_bad_files_have_a_reason_and_leave_nothing(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadImage) as caught:
        store_image(tmp_path / "a.png", tmp_path / "out")
    assert caught.value.reason.startswith(reason)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("value", [0, 77])
def test_a_picture_of_one_grey_level_is_refused(tmp_path, value):
    with pytest.raises(BadImage, match="picture of one grey level"):
        store_image(np.full((4, 4), value, dtype=np.uint8), tmp_path)
    almost = np.full((4, 4), value, dtype=np.uint8)
    almost[1, 2] += 1
    store_image(almost, tmp_path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "a\0b.png"):
        with pytest.raises(BadImage, match="image can't be read"):
            store_image(path, tmp_path / "out")


def test_several_processes_store_the_same_picture(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        stored = list(pool.map(store_image, [NOISE] * 40, [tmp_path] * 40))
    assert len(set(stored)) == 1
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert (np.asarray(Image.open(file)) == NOISE).all()


def test_an_error_survives_the_way_from_a_worker():
    import pickle

    error = pickle.loads(pickle.dumps(BadImage("image is truncated", "half")))
    assert (error.reason, error.detail) == ("image is truncated", "half")


def test_files_of_the_pixel_formats_set(shared_data, tmp_path):
    """One crop, saved as 8 and 16 bit, grey and colour: the stored grey twins show the same."""
    found = {}
    for path in sorted((shared_data / "sem_pixel_formats").rglob("*")):
        if path.suffix in (".png", ".tif", ".tiff"):
            found[path.name] = store_image(path, tmp_path)
    assert len(found) == 14
    kinds = {name: Image.open(tmp_path / stored.path).mode for name, stored in found.items()}
    assert set(kinds.values()) <= {"L", "RGB"}

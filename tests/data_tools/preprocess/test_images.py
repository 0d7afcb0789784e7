# SPDX-License-Identifier: Apache-2.0

"""Images that are put into a corpus: what is kept byte for byte, what is written anew, what is refused."""

import io
import pickle
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_tools.preprocess.images import read_pixels, store_image
from gmai_xtuner.core.errors import Unusable

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def encoded(kind: str, *pages: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(
        buffer, kind, **({"save_all": True, "append_images": rest} if rest else {}), **options
    )
    return buffer.getvalue()


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


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("progressive", [False, True])
def test_nothing_but_the_image_stays_in_a_jpeg(tmp_path, progressive):
    plain = saved(tmp_path / "a.jpg", NOISE, quality=90, progressive=progressive).read_bytes()
    jfif, rest = plain[2:20], plain[20:]
    scan = plain.rindex(b"\xff\xda") if progressive else plain.index(b"\xff\xc0")
    profile = b"ICC_PROFILE\0\1\1" + b"desc Doe^John"
    variants = {
        "a second JPEG": plain + plain[:2] + segment(0xFE, b"Doe^John") + plain[2:],
        "behind the end": plain + b"Doe^John",
        "a comment between scans": plain[:scan] + segment(0xFE, b"Doe^John") + plain[scan:],
        "a foreign APP14": plain[:2] + jfif + segment(0xEE, b"Doe^John....") + rest,
        "ICC": plain[:2] + jfif + segment(0xE2, profile) + rest,
        "behind JFIF's numbers": plain[:2] + segment(0xE0, jfif[4:] + b"Doe^John") + rest,
        "fill bytes": plain[:2] + b"\xff\xff" + segment(0xE1, b"Doe^John") + plain[2:],
    }
    for name, data in variants.items():
        (tmp_path / "a.jpg").write_bytes(data)
        stored = store_image(tmp_path / "a.jpg", tmp_path / name)
        kept = (tmp_path / name / stored.path).read_bytes()
        assert kept == plain, name


def test_no_profile_and_no_text_stays_in_a_png(tmp_path):
    plain = saved(tmp_path / "plain.png", NOISE).read_bytes()
    for kind in (b"iCCP", b"sPLT", b"cHRM", b"pHYs", b"doEs"):
        named = chunk(kind, b"Doe^John" + bytes(40))
        (tmp_path / "a.png").write_bytes(plain[:33] + named + plain[33:])
        stored = store_image(tmp_path / "a.png", tmp_path / "out")
        assert (tmp_path / "out" / stored.path).read_bytes() == plain, kind


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_rotation_is_applied_and_told(tmp_path, suffix):
    """Boxes in a turned file may be those of the file as stored: a TIFF must say so as well."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    file = saved(tmp_path / f"a.{suffix}", NOISE, exif=exif)
    stored = store_image(file, tmp_path / "out")
    assert stored.turned
    assert (stored.width, stored.height) == (20, 30)
    shown = np.asarray(Image.open(tmp_path / "out" / stored.path))
    if suffix != "jpg":
        assert (shown == np.rot90(NOISE, -1)).all()


@pytest.mark.parametrize(
    "pixels",
    [
        np.array([[1000, 3000, 5000]], dtype=np.uint16),
        np.array([[-1.0, 0.0, 1.0]]),
        np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8),
    ],
)
def test_everything_else_is_written_as_training_decodes_it(tmp_path, pixels):
    image = pixels if pixels.dtype.kind == "f" else saved(tmp_path / "a.png", pixels)
    stored = store_image(image, tmp_path / "out")
    found = np.asarray(Image.open(tmp_path / "out" / stored.path))
    expected = [[0, 128, 255]] if pixels.ndim == 2 else [[[200, 100, 50], [0, 0, 0]]]
    assert found.tolist() == expected
    assert np.array_equal(read_pixels(tmp_path / "out" / stored.path).pixels, found)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PNG = encoded("PNG", NOISE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is truncated"),
        (b"hello", "image can't be read"),
        (PNG[:-300], "image is truncated"),
        (encoded("JPEG", NOISE.repeat(20, axis=0), quality=95)[:-3000], "image is truncated"),
        (PNG[:30], "image"),
        (bomb(60_000, 60_000), "image is too large"),
        (bomb(10_000, 10_000), "image is truncated"),
        (encoded("TIFF", *NOISE.transpose(2, 0, 1)), "image is of an unsupported kind"),
        (encoded("TIFF", np.array([[np.nan]], np.float32)), "image is of an unsupported kind"),
    ],
)
def test_bad_files_have_a_reason_and_leave_nothing(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(Unusable) as caught:
        store_image(tmp_path / "a.png", tmp_path / "out")
    assert caught.value.reason.startswith(reason)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("value", [0, 77])
def test_an_image_of_one_grey_level_is_refused(tmp_path, value):
    with pytest.raises(Unusable, match="picture of one grey level"):
        store_image(np.full((4, 4), value, dtype=np.uint8), tmp_path)
    almost = np.full((4, 4), value, dtype=np.uint8)
    almost[1, 2] += 1
    store_image(almost, tmp_path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "a\0b.png"):
        with pytest.raises(Unusable, match="image can't be read"):
            store_image(path, tmp_path / "out")


def test_several_processes_store_the_same_image(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        stored = list(pool.map(store_image, [NOISE] * 40, [tmp_path] * 40))
    assert len(set(stored)) == 1
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert (np.asarray(Image.open(file)) == NOISE).all()


def test_an_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(Unusable("image is truncated", "half")))
    assert (error.reason, error.detail) == ("image is truncated", "half")
    assert str(error) == "image is truncated: half"


def test_files_of_the_pixel_formats_set(shared_data, tmp_path):
    """One crop, saved as 8 and 16 bit, grey and colour."""
    files = sorted((shared_data / "sem_pixel_formats").rglob("*"))
    stored = [
        store_image(path, tmp_path) for path in files if path.suffix in (".png", ".tif", ".tiff")
    ]
    assert len(stored) == 14
    assert {Image.open(tmp_path / one.path).mode for one in stored} <= {"L", "RGB"}

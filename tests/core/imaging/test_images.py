# SPDX-License-Identifier: Apache-2.0

"""Files of every kind -> 8-bit images: what is decoded, how, and what is refused."""

import os
import pickle
import signal
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from gmai_xtuner.core.errors import DataError, GMAIError, ImageError, Unusable
from gmai_xtuner.core.imaging import images as image_files
from gmai_xtuner.core.imaging.bounded import DIED, FAILED, iterate_bounded, run_bounded
from gmai_xtuner.core.imaging.images import check_image, decode_pixels, decode_rgb, open_rgb
from gmai_xtuner.core.records import iter_raw
from gmai_xtuner.demo.files import open_files
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.studies import Limits

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared sample data")

GREY_12 = np.linspace(0, 4095, 48 * 64).round().astype(np.uint16).reshape(48, 64)
RGB_8 = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def pixels(path) -> np.ndarray:
    """RGB pixels; a file's bytes are the same image, and so is its grey form."""
    image = open_rgb(path)
    assert image.mode == "RGB"
    content = path.read_bytes()
    assert decode_rgb(content, "a") == image
    found = decode_pixels(content, "a").pixels
    shown = found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=2)
    assert np.array_equal(shown, image)
    return np.asarray(image)


def grey(path) -> np.ndarray:
    """The one channel of a grey picture."""
    array = pixels(path)
    assert (array == array[:, :, :1]).all()
    return array[:, :, 0]


def refused(path, *, level="decode", **options) -> ImageError:
    with pytest.raises(ImageError) as caught:
        check_image(path, level=level, **options)
    assert repr(str(path)) in str(caught.value)
    return caught.value


def write_png(path, levels: np.ndarray, *, bits: int, colour: int, extra=()) -> Path:
    """A PNG of any bit depth, with extra chunks before the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    height, width = levels.shape[:2]
    rows = levels.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks))
    return path


def save_tiff(path, array, **tags) -> Path:
    """A TIFF by tifffile, independent of the reader under test."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, array, **tags)
    return path


# --- 8 bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "jp2", "ppm", "jpg", "gif"])
def test_plain_rgb_is_what_pillow_gives(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB_8).save(file)
    assert np.array_equal(pixels(file), np.asarray(Image.open(file).convert("RGB")))
    if suffix in ("png", "tif", "bmp", "ppm"):
        assert np.array_equal(pixels(file), RGB_8)
    for level in ("exists", "header", "decode"):
        check_image(file, level=level)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_shallow_modes_are_what_pillow_gives(tmp_path, mode):
    file = tmp_path / "a.tif"
    Image.fromarray(RGB_8).convert(mode).save(file)
    assert np.array_equal(pixels(file), np.asarray(Image.open(file).convert("RGB")))
    if mode == "1":
        assert set(np.unique(pixels(file))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_black_and_opaque_alpha_is_dropped(tmp_path, mode):
    picture = Image.fromarray(RGB_8).convert(mode)
    alpha = np.full((48, 64), 255, dtype=np.uint8)
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "opaque.png")
    opaque = pixels(tmp_path / "opaque.png")
    assert np.array_equal(opaque, np.asarray(picture.convert("RGB")))
    alpha[:10], alpha[10:20] = 0, 128
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png")
    assert (found[:10] == 0).all()
    np.testing.assert_allclose(found[10:20], opaque[10:20] * (128 / 255), atol=1)
    assert np.array_equal(found[20:], opaque[20:])


def test_transparent_colour_of_a_png(tmp_path):
    row = np.array([[0, 100, 200, 255]])
    file = write_png(
        tmp_path / "a.png", row, bits=8, colour=0, extra=[(b"tRNS", struct.pack(">H", 255))]
    )
    assert grey(file).tolist() == [[0, 100, 200, 0]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / f"a.{suffix}", exif=exif)
    file = tmp_path / f"a.{suffix}"
    np.testing.assert_allclose(pixels(file), upright, atol=12)
    assert decode_pixels(file.read_bytes(), "a")[1:] == (True, "")


def test_exif_orientation_of_narrow_16_bit_colour(tmp_path):
    levels = np.stack([GREY_12, GREY_12 // 2, GREY_12 // 4], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6
    tag = (b"eXIf", exif.tobytes()[6:])
    file = write_png(tmp_path / "a.png", levels, bits=16, colour=2, extra=[tag])
    assert np.array_equal(pixels(file), np.rot90(np.rint(levels * (255 / 4095)), -1))


@pytest.mark.parametrize(
    ("name", "mode", "suffix"),
    [("a.png", "RGB", ".png"), ("a.jpg", "L", ".jpg"), ("a.png", "P", ""), ("a.tif", "L", "")],
)
def test_files_that_every_viewer_shows_alike_are_named(tmp_path, name, mode, suffix):
    Image.fromarray(RGB_8).convert(mode).save(tmp_path / name)
    assert decode_pixels((tmp_path / name).read_bytes(), name)[1:] == (False, suffix)


# --- 16 bit --------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("kind", ["gray", "rgb", "rgba"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_real_16_bit_files_look_like_their_8_bit_twins(kind, suffix):
    folder = SHARED / "sem_pixel_formats" / f"sub-{suffix}" / "micr"
    twin_suffix = "tif" if kind == "gray" else suffix  # the 8 bit grey PNG is another crop
    twins = SHARED / "sem_pixel_formats" / f"sub-{twin_suffix}" / "micr"
    deep = pixels(folder / f"sub-{suffix}_sample-16{kind}_SEM.{suffix}")
    twin = pixels(twins / f"sub-{twin_suffix}_sample-8{kind}_SEM.{twin_suffix}")
    assert (deep.min(), deep.max()) == (2, 215)
    assert np.array_equal(deep, twin)


def test_full_range_16_bit_grey_keeps_its_high_byte(tmp_path):
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png").tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("offset", [0, 31744], ids=["12 bit", "Hounsfield + 32768"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_narrow_16_bit_grey_is_neither_black_nor_flat(tmp_path, suffix, offset):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(GREY_12 + np.uint16(offset)).save(file)
    expected = np.rint(GREY_12 * (255 / 4095))
    assert np.array_equal(grey(file), expected)


@pytest.mark.parametrize(
    ("array", "tags"),
    [
        (GREY_12, {"byteorder": ">"}),
        (GREY_12.astype(np.int16) - 1024, {}),
        (GREY_12.astype(np.int32) * 1000, {}),
        (GREY_12.astype(np.uint32), {}),
        (GREY_12.astype(np.float32) / 4095, {}),
        (4095 - GREY_12, {"photometric": "miniswhite"}),
    ],
    ids=["big-endian", "signed", "int32", "uint32", "float", "white is zero"],
)
def test_every_deep_grey_tiff_is_the_same_picture(tmp_path, array, tags):
    file = save_tiff(tmp_path / "a.tif", array, **tags)
    np.testing.assert_allclose(grey(file), GREY_12 * (255 / 4095), atol=0.51)


def test_signed_bytes_of_a_tiff_rise_from_the_smallest(tmp_path):
    levels = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    assert np.array_equal(grey(save_tiff(tmp_path / "a.tif", levels)).ravel(), np.arange(256))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_narrow_16_bit_colour_shares_one_window(tmp_path, suffix):
    levels = np.stack([GREY_12, GREY_12 // 2, GREY_12 // 4], axis=-1)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), levels[:, :, ::-1])
    assert np.asarray(Image.open(tmp_path / f"a.{suffix}")).max() == 15  # as Pillow has it
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.rint(levels * (255 / 4095)))


def test_16_bit_grey_with_opaque_alpha(tmp_path):
    levels = np.stack([GREY_12, np.full_like(GREY_12, 65535)], axis=-1)
    file = write_png(tmp_path / "a.png", levels, bits=16, colour=4)
    assert np.array_equal(grey(file), np.rint(GREY_12 * (255 / 4095)))


def test_transparent_level_of_16_bit_grey_is_black_and_outside_the_window(tmp_path):
    levels = GREY_12.copy()
    levels[0] = 60000
    tag = (b"tRNS", struct.pack(">H", 60000))
    found = grey(write_png(tmp_path / "a.png", levels, bits=16, colour=0, extra=[tag]))
    assert (found[0] == 0).all()
    assert (found[1, 0], found[-1, -1]) == (0, 255)


def test_constant_16_bit_picture_is_its_high_byte(tmp_path):
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (grey(tmp_path / "a.png") == 255).all()


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("level", ["header", "decode"])
def test_float_with_nan_is_refused(tmp_path, value, level):
    array = GREY_12.astype(np.float32)
    array[3, 3] = value
    error = refused(save_tiff(tmp_path / "a.tif", array), level=level)
    assert error.reason == "unsupported_image"
    assert "NaN" in str(error)


def test_stack_is_refused_but_a_thumbnail_page_is_not(tmp_path):
    page = Image.fromarray(RGB_8)
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page])
    error = refused(tmp_path / "stack.tif", level="header")
    assert error.reason == "unsupported_image"
    assert "stack" in str(error)
    page.save(tmp_path / "thumb.tif", save_all=True, append_images=[page.resize((8, 8))])
    assert np.array_equal(pixels(tmp_path / "thumb.tif"), RGB_8)


def test_16_bit_planes_that_would_be_read_as_noise_are_refused(tmp_path):
    planes = np.stack([GREY_12] * 3)
    file = save_tiff(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    assert refused(file, level="header").reason == "unsupported_image"


def test_other_unsupported_files(tmp_path):
    Image.fromarray(RGB_8).convert("LAB").save(tmp_path / "lab.tif")
    assert refused(tmp_path / "lab.tif", level="header").reason == "unsupported_image"
    save_tiff(tmp_path / "double.tif", GREY_12.astype(np.float64))
    assert refused(tmp_path / "double.tif", level="header").reason == "unsupported_image"
    (tmp_path / "text.png").write_text("this is no picture at all")
    assert refused(tmp_path / "text.png", level="header").reason == "unsupported_image"
    levels = np.stack([GREY_12] * 3, axis=-1)
    tag = (b"tRNS", struct.pack(">HHH", 1, 2, 3))
    file = write_png(tmp_path / "a.png", levels, bits=16, colour=2, extra=[tag])
    assert refused(file).reason == "unsupported_image"


@pytest.mark.parametrize(
    "content",
    [b"Doe^John, born 1950", b"P5\nDoe^John 20\n255\n" + bytes(400), b"P2\n2 1\n255\nDoe^John 7\n"],
)
def test_what_a_bad_file_holds_is_not_repeated(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "Doe" not in str(refused(tmp_path / "a.png"))


@pytest.mark.parametrize("level", ["exists", "header", "decode"])
def test_missing_image(tmp_path, level):
    (tmp_path / "folder").mkdir()
    for name in ("none.png", "folder", "a\0b.png", "x" * 300):
        assert refused(tmp_path / name, level=level).reason == "missing_image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif", "jp2", "ppm"])
@pytest.mark.parametrize("level", ["header", "decode"])
def test_truncated_image_is_found(tmp_path, suffix, level):
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(RGB_8).save(whole)
    data = whole.read_bytes()
    for share in (0, 0.05, 0.5, 0.9):
        part = tmp_path / f"part.{suffix}"
        part.write_bytes(data[: int(len(data) * share)])
        assert refused(part, level=level).reason in ("damaged_image", "unsupported_image")
    assert refused(part, level=level).reason == "damaged_image"
    check_image(whole, level=level)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif"])
def test_header_check_of_a_whole_file_decodes_nothing(tmp_path, suffix, monkeypatch):
    Image.fromarray(RGB_8).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(image_files, "_decode", lambda *_: pytest.fail("decoded"))
    check_image(tmp_path / f"a.{suffix}", level="header")


def test_header_check_decodes_where_the_end_mark_is_missing(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(RGB_8).save(file)
    file.write_bytes(file.read_bytes() + b"appended by a camera" * 10)
    check_image(file, level="header")


def test_enormous_image_is_refused_before_decoding(tmp_path, monkeypatch):
    file = write_png(tmp_path / "a.png", np.zeros((2, 2)), bits=8, colour=0)
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    for level in ("header", "decode"):
        error = refused(file, level=level)
        assert error.reason == "enormous_image"
        assert "900000000" in str(error)
        assert "178956970" in str(error)


def test_max_pixels_is_ours_alone(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse over 200
    for name, options in (("a.tif", {}), ("b.tif", {"compression": "tiff_lzw"}), ("c.png", {})):
        Image.fromarray(RGB_8).save(tmp_path / name, **options)
        assert np.array_equal(np.asarray(open_rgb(tmp_path / name, max_pixels=48 * 64)), RGB_8)
        assert refused(tmp_path / name, max_pixels=48 * 64 - 1).reason == "enormous_image"
    assert not recwarn.list
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "c.png")


# --- what costs more than it shows -----------------------------------------------------------


def png_of(path, width: int, height: int) -> Path:
    """Black pixels, in a file a thousand times smaller."""
    return write_png(path, np.zeros((height, width), np.uint8), bits=8, colour=0)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((10, 65_536), "enormous_image"),  # a side
        ((65_536, 10), "enormous_image"),
        ((10, 10_001), "enormous_image"),  # the ratio
        ((60_000, 1), "enormous_image"),
        ((10, 10_000), None),
        ((1, 1_000), None),
    ],
)
@pytest.mark.parametrize("level", ["header", "decode"])
def test_sides_and_their_ratio_are_bounded(tmp_path, size, reason, level):
    file = png_of(tmp_path / "a.png", *size)
    if reason is None:
        check_image(file, level=level)
    else:
        assert refused(file, level=level).reason == reason


def test_pages_of_a_tiff_are_counted_up_to_a_bound(tmp_path, monkeypatch):
    pages = [Image.new("L", (8, 8 + number % 2)) for number in range(1, 100)]
    Image.new("L", (30, 30)).save(tmp_path / "a.tif", save_all=True, append_images=pages)
    seeks = []
    real = TiffImagePlugin.TiffImageFile.seek
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile,
        "seek",
        lambda image, page: seeks.append(page) or real(image, page),
    )
    error = refused(tmp_path / "a.tif", level="header")
    assert (error.reason, "64 or more pages" in str(error)) == ("unsupported_image", True)
    assert max(seeks) < image_files.MAX_PAGES


def test_a_jpeg_of_endless_scans_is_refused(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(RGB_8).save(file, progressive=True)
    content = file.read_bytes()
    start = content.rindex(b"\xff\xda")
    file.write_bytes(content[:start] + content[start:-2] * 100 + content[-2:])
    assert refused(file, level="header").reason == "enormous_image"


def test_a_tile_larger_than_its_image_is_refused(tmp_path):
    file = save_tiff(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), tile=(32, 32))
    content = bytearray(file.read_bytes())
    with Image.open(file) as image:
        assert image.tag_v2[322] == image.tag_v2[323] == 32
    for tag in (322, 323):
        at = content.index(struct.pack("<HHI", tag, 4, 1))
        struct.pack_into("<I", content, at + 8, 60_000)
    file.write_bytes(content)
    assert refused(file, level="header").reason == "enormous_image"


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_moving_image_is_not_its_first_frame(tmp_path, suffix):
    frames = [Image.new("L", (20, 20), 40 * number) for number in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    error = refused(tmp_path / f"a.{suffix}", level="header")
    assert (error.reason, "moving" in str(error)) == ("unsupported_image", True)


def test_too_little_memory_is_an_error_of_the_image(tmp_path, monkeypatch):
    Image.fromarray(RGB_8).save(tmp_path / "a.png")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert refused(tmp_path / "a.png").reason == "enormous_image"


@pytest.mark.parametrize("kind", ["narrow 16 bit png", "raw tiff", "raw bmp"])
def test_no_file_of_the_name_is_opened(tmp_path, monkeypatch, kind):
    """Pillow maps uncompressed files into memory by their name."""
    narrow = np.stack([GREY_12, GREY_12 // 2, GREY_12 // 4], axis=-1)
    sent = tmp_path / "sent"
    if kind.startswith("narrow"):
        write_png(sent, narrow, bits=16, colour=2)
        expected = np.rint(narrow * (255 / 4095))
    else:
        Image.fromarray(RGB_8[..., 0]).save(sent, kind.split()[1].upper())
        expected = np.repeat(RGB_8[..., :1], 3, axis=2)
    content = sent.read_bytes()
    (tmp_path / "a").write_bytes(bytes(len(content)))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(decode_rgb(content, "a"), expected)
    (tmp_path / "a").unlink()
    assert np.array_equal(decode_rgb(content, "a"), expected)


# --- damage that decoders pass over ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "found", "silent"),
    [
        ("a.jpg", {"quality": 90}, 8, 6),
        ("a.jpg", {"quality": 90, "progressive": True}, 6, 6),  # zeros may mean "no change" there
        ("a.png", {}, 8, 0),
        ("a.tif", {"compression": "tiff_deflate"}, 8, 0),
        ("a.tif", {"compression": "jpeg"}, 8, 0),
    ],
)
def test_damage_inside_is_found(tmp_path, name, options, found, silent):
    """2,000 zeros at eight places; ``silent`` is how many of them the plain decoder shows as an image."""
    y, x = np.mgrid[0:300, 0:400]
    shades = np.stack([np.hypot(x - 90, y - 40), x * 0.6, y * 0.8], axis=-1)
    shades += np.random.default_rng(0).normal(0, 6, shades.shape)
    Image.fromarray(shades.clip(0, 255).astype(np.uint8)).save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    check_image(tmp_path / name, level="decode")
    refusals, passed_over = 0, 0
    for at in np.linspace(2_000, len(content) - 4_000, 8).astype(int):
        damaged = content[:at] + bytes(2_000) + content[at + 2_000 :]
        (tmp_path / name).write_bytes(damaged)
        try:
            check_image(tmp_path / name, level="decode")
        except ImageError as error:
            refusals += error.reason == "damaged_image"
            with pytest.raises(ImageError, match="damaged"):
                decode_pixels(damaged, name)
        try:
            open_rgb(tmp_path / name)
            passed_over += 1
        except ImageError:
            pass
    assert refusals >= found
    assert passed_over >= silent, "the plain decoder finds this damage too"


def test_error_says_which_image_and_why_also_in_another_process(tmp_path):
    error = refused(tmp_path / "a.png")
    assert isinstance(error, DataError)
    assert error.reason == "missing_image"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert pickle.loads(pickle.dumps(error)).reason == error.reason


def test_unknown_level(tmp_path):
    with pytest.raises(ValueError, match="level must be"):
        check_image(tmp_path, level="deep")


@pytest.mark.parametrize(
    "name",
    [
        *("Scans\\é 1.png", "Scans/%C3%A9%201.png", "scans/É 1.PNG"),
        *("Scans/ é 1.png ", "Scans/e\u0301 1.png", "~/é 1.png"),
    ],
    ids=["backslash", "percent", "case", "blanks", "unicode", "home"],
)
@pytest.mark.parametrize("level", ["exists", "decode"])
def test_a_misspelt_path_is_told_the_file_that_is_there(tmp_path, monkeypatch, name, level):
    there = tmp_path / "Scans" / "é 1.png"
    there.parent.mkdir()
    Image.new("RGB", (4, 4)).save(there)
    monkeypatch.setenv("HOME", str(there.parent))
    error = refused(tmp_path / name, level=level)
    assert error.reason == "missing_image"
    assert f"Did you mean {str(there)!r}?" in str(error)


def test_a_path_that_nothing_is_like_is_told_no_other(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert "Did you mean" not in str(refused(tmp_path / "b.png", level="exists"))


# --- A worker process that dies, hangs or takes too much costs its own call, and no other ---


def double(values):
    return values * 2


def where():
    return os.getpid()


def abort():
    os.abort()


def spin():
    while True:
        pass


def allocate():
    return len(bytearray(2**29))


def refuse():
    raise Unusable("a reason", "a detail")


def panic():
    raise SystemExit("pyo3 panics are no Exception either")


def test_results_come_from_another_process_that_is_used_again():
    assert run_bounded(double, np.arange(3)).tolist() == [0, 2, 4]
    first = run_bounded(where)
    assert first != os.getpid()
    assert run_bounded(where) == first
    os.kill(
        first, signal.SIGKILL
    )  # the system, for its memory: the next file is a good one all the same
    time.sleep(0.2)
    assert run_bounded(where) != first


@pytest.mark.parametrize(
    ("function", "limits", "reason"),
    [
        (abort, {}, DIED),
        (spin, {"seconds": 1}, DIED),
        (allocate, {"memory": 2**28}, FAILED),
        (refuse, {}, "a reason"),
        (panic, {}, FAILED),
    ],
)
def test_a_bad_call_has_a_reason_and_the_next_one_is_answered(function, limits, reason):
    started = time.monotonic()
    with pytest.raises(Unusable) as caught:
        run_bounded(function, **limits)
    assert caught.value.reason == reason
    assert time.monotonic() - started < 10
    assert run_bounded(double, 2) == 4


def test_memory_that_is_allowed_is_given():
    assert run_bounded(allocate) == 2**29


def count(end, *, then=None):
    yield from range(end)
    if then is not None:
        then()


def count_and_abort(end):
    yield from count(end, then=abort)


def test_what_a_generator_yields_comes_as_it_is_asked_for():
    assert list(iterate_bounded(count, 1000)) == list(range(1000))
    first = iterate_bounded(count, 10**9)
    assert [next(first), next(first)] == [0, 1]
    first.close()  # its worker does not answer the next call
    assert run_bounded(double, 3) == 6
    last = iterate_bounded(count_and_abort, 2)
    assert [next(last), next(last)] == [0, 1]
    with pytest.raises(Unusable, match=DIED):
        next(last)


def test_a_tiff_that_ends_its_decoder_costs_one_file_in_training_and_page(tmp_path, planted):
    levels = np.stack([GREY_12, GREY_12 // 2, GREY_12 // 4], axis=-1)  # OpenCV's, in the worker
    cv2.imwrite(str(tmp_path / "a.tif"), levels)
    planted("cv2", "import os; os.abort()")
    assert DIED in str(refused(tmp_path / "a.tif"))
    (one,) = open_files([("a", tmp_path / "a.tif")], Limits())
    assert isinstance(one.study, PageError)


def test_a_parquet_of_one_long_text_many_times_is_a_documented_error(tmp_path):
    values = pa.DictionaryArray.from_arrays(np.zeros(2**16, np.int8), ["x" * 10**7])
    schema = pa.schema([("conversations", values.type)])
    with pq.ParquetWriter(tmp_path / "bomb.parquet", schema, compression="zstd") as writer:
        writer.write_table(pa.table([values], schema=schema))
    assert (tmp_path / "bomb.parquet").stat().st_size < 10**5
    with pytest.raises(GMAIError, match="Parquet"):
        list(iter_raw(tmp_path / "bomb.parquet"))


def test_the_damage_of_a_png_is_not_lost_when_its_orientation_is_asked_for_first(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"broken|decod|data"), Image.open(path) as image:
        image_files.orientation_of(image)

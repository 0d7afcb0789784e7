from __future__ import annotations

import json
import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import CLIPImageProcessor

from gmai_xtuner.core.errors import DataError, ImageError, ModelLoadError
from gmai_xtuner.core.imaging import images as image_files
from gmai_xtuner.core.imaging.images import open_reduced
from gmai_xtuner.data import images
from gmai_xtuner.data.images import ImageTransform, check_image, open_rgb

SHARED = Path(__file__).parents[3] / "shared" / "data"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared sample data")

GREY_12 = np.linspace(0, 4095, 48 * 64).round().astype(np.uint16).reshape(48, 64)
RGB_8 = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def pixels(path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
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


# --- transform ------------------------------------------------------------------------------


def xtuner_pixels(image: Image.Image, processor: CLIPImageProcessor) -> torch.Tensor:
    from xtuner.dataset.utils import expand2square

    square = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
    return processor.preprocess(square, return_tensors="pt")["pixel_values"][0]


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size=336, image_mean=list(MEAN), image_std=list(STD)
    )


@pytest.mark.parametrize(
    "size",
    [(4, 4), (1, 7), (7, 1), (336, 336), (336, 300), (300, 336), (335, 337), (640, 480),
     (480, 641), (1000, 3), (3, 1000), (513, 512), (1200, 900), (4000, 20), (20, 4000)],
)  # fmt: skip
def test_padded_pixels_are_bit_identical_to_xtuner(size, processor):
    width, height = size
    generator = np.random.default_rng(width * 10_000 + height)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    ours = ImageTransform(336, MEAN, STD)(image)
    assert ours.dtype == torch.float32
    assert ours.shape == (3, 336, 336)
    assert torch.equal(ours, xtuner_pixels(image, processor))


@needs_shared
def test_real_images_are_bit_identical_to_xtuner(processor):
    transform = ImageTransform(336, MEAN, STD)
    files = [p for p in SHARED.rglob("*.*") if p.suffix in (".png", ".jpg", ".jpeg", ".tif")]
    compared = 0
    for file in sorted(files)[::3]:
        plain = Image.open(file)
        image = open_rgb(file)
        if not plain.mode.startswith("I"):  # there xtuner clips 16 bit to white
            assert np.array_equal(np.asarray(image), np.asarray(plain.convert("RGB"))), file
        assert torch.equal(transform(image), xtuner_pixels(image, processor)), file
        compared += 1
    assert compared > 30


def test_long_strip_never_becomes_a_square(monkeypatch):
    strips = [Image.new("RGB", size) for size in ((12_000, 8), (8, 12_000))]
    made = []
    real = Image.new

    def new(mode, size, *args):
        made.append(size[0] * size[1])
        return real(mode, size, *args)

    monkeypatch.setattr(Image, "new", new)
    for strip in strips:
        ImageTransform(336, MEAN, STD)(strip)
    assert made
    assert max(made) <= 336 * 12_000


def test_resize_mode_fills_the_square():
    image = Image.fromarray(RGB_8)
    values = ImageTransform(32, (0, 0, 0), (1, 1, 1), mode="resize")(image)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_pad_colour_is_the_mean():
    values = ImageTransform(8, (0.5, 0.25, 0), (1, 1, 1))(Image.new("RGB", (8, 2), "white"))
    np.testing.assert_allclose(values[:, 0, 0].numpy(), [127 / 255 - 0.5, 63 / 255 - 0.25, 0])
    assert values[2, 4, 4] == 1


def test_transform_pickles_and_refuses_other_modes():
    transform = pickle.loads(pickle.dumps(ImageTransform(16, MEAN, STD)))
    assert transform.mode == "pad"
    with pytest.raises(ValueError, match="mode RGB, got L"):
        transform(Image.new("L", (4, 4)))


@pytest.mark.parametrize(
    "arguments",
    [(0, MEAN, STD, "pad"), (True, MEAN, STD, "pad"), (8, MEAN, STD, "crop"),
     (8, MEAN[:2], STD, "pad"), (8, MEAN, (1, 1, 0), "pad")],
)  # fmt: skip
def test_transform_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="got"):
        ImageTransform(*arguments[:3], mode=arguments[3])


# --- preprocessor_config.json -----------------------------------------------------------------

CONFIG = {"size": 28, "crop_size": 28, "image_mean": MEAN, "image_std": STD}


@pytest.mark.parametrize("size", [28, {"shortest_edge": 28}, {"height": 28, "width": 28}])
def test_from_pretrained_reads_every_form_of_size(tmp_path, size):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**CONFIG, "size": size, "crop_size": size}))
    for path in (tmp_path, file, str(tmp_path)):
        transform = ImageTransform.from_pretrained(path, mode="resize")
        assert (transform.image_size, transform.mode) == (28, "resize")
        assert transform.mean == MEAN


def test_from_pretrained_reads_what_transformers_writes(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    assert repr(ImageTransform.from_pretrained(tmp_path)) == repr(ImageTransform(336, MEAN, STD))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_size": {"height": 28, "width": 24}}, "crop_size must be a square"),
        ({"size": {"longest_edge": 28}}, "size must be a square"),
        ({"size": None}, "size must be a square"),
        ({"crop_size": 24}, "size 28 and crop_size 24 differ"),
        ({"resample": 2}, "resample must be 3"),
        ({"do_normalize": False}, "do_normalize must be True"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
    ],
)
def test_from_pretrained_refuses_what_it_cannot_do(tmp_path, change, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(ModelLoadError, match=words):
        ImageTransform.from_pretrained(tmp_path)


def test_from_pretrained_without_file(tmp_path):
    with pytest.raises(ModelLoadError, match="does not exist"):
        ImageTransform.from_pretrained(tmp_path)


# --- scaled decoding --------------------------------------------------------------------------


def scan(width: int, height: int) -> Image.Image:
    """Like a photograph or scan: shading, edges of all directions, a little grain."""
    y, x = np.mgrid[0:height, 0:width]
    rings = np.hypot(x - 0.4 * width, y - 0.55 * height) // 60 % 2
    grain = np.random.default_rng(width).normal(0, 3, (height, width))
    grey = 60 + 80 * rings + 60 * x / width + 30 * np.sin(y / 50) + grain
    colour = np.stack([grey, 0.9 * grey + 10, 255 - grey], axis=-1)
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8))


def read_both_ways(path, mode: str = "pad") -> tuple[np.ndarray, np.ndarray]:
    """Levels 0..255 after full and scaled decoding."""
    full, scaled = (
        ImageTransform(336, MEAN, STD, mode=mode, decoding=decoding).read(path).numpy()
        for decoding in ("full", "scaled")
    )
    spread = 255 * np.array(STD)[:, None, None]
    return full * spread, scaled * spread


@pytest.mark.parametrize("mode", ["pad", "resize"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize(
    "size", [(1345, 1345), (2048, 1501), (1501, 2049), (2731, 1377), (1350, 2999)]
)
def test_scaled_decoding_stays_close_to_full(tmp_path, size, subsampling, mode):
    """A shift by a quarter of a pixel of the result would be 20 levels at the edges of the rings."""
    file = tmp_path / "scan.jpg"
    scan(*size).save(file, quality=92, subsampling=subsampling)
    full, scaled = read_both_ways(file, mode)
    assert not (full == scaled).all()  # it was decoded at a fraction
    assert np.abs(full - scaled).max() <= 8.5
    assert np.abs(full - scaled).mean() <= 0.5


@pytest.mark.parametrize("size", [(2049, 1337), (1337, 2049)])
def test_scaled_decoding_of_noise_is_bounded(tmp_path, size):
    """No picture has more of the frequencies that are left out."""
    file = tmp_path / "noise.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, quality=90)
    full, scaled = read_both_ways(file)
    assert np.abs(full - scaled).max() <= 24
    assert np.abs(full - scaled).mean() <= 3


def test_scaled_decoding_puts_padding_where_full_decoding_does(tmp_path):
    """White on the mean colour: a shift of the border by half a pixel would be 60 levels."""
    for size in [(2045, 1003), (1003, 2045), (2691, 1363), (2700, 77)]:
        file = tmp_path / "white.jpg"
        Image.new("RGB", size, "white").save(file)
        full, scaled = read_both_ways(file)
        assert np.abs(full - scaled).max() <= 4, size


@pytest.mark.parametrize(
    ("size", "mode", "by"),
    [
        ((1343, 1343), "pad", 1),
        ((1344, 1000), "pad", 2),
        ((1344, 1343), "resize", 1),
        ((1344, 1344), "resize", 2),
        ((2687, 100), "pad", 2),
        ((2688, 100), "pad", 4),
        ((5376, 50), "pad", 8),
        ((9000, 50), "pad", 8),
    ],
)
def test_scaled_decoding_keeps_two_pixels_for_one(tmp_path, monkeypatch, size, mode, by):
    file = tmp_path / "a.jpg"
    Image.new("L", size, 90).save(file)
    seen = []
    monkeypatch.setattr(
        images, "open_reduced", lambda *a, **k: seen.append(open_reduced(*a, **k)) or seen[-1]
    )
    ImageTransform(336, MEAN, STD, mode=mode, decoding="scaled").read(file)
    assert seen[0].by == by
    assert seen[0].size == size
    assert seen[0].image.size == (-(-size[0] // by), -(-size[1] // by))


def test_scaled_decoding_leaves_every_other_kind_whole(tmp_path):
    picture = scan(1500, 1400)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    deep = (np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 7
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("a.png", "a.webp", "a.bmp", "a.tif"):
        picture.save(tmp_path / name)
    for file in sorted(tmp_path.iterdir()):
        full, scaled = read_both_ways(file)
        assert (full == scaled).all(), file.name


def test_scaled_decoding_finds_what_full_decoding_finds(tmp_path):
    transform = ImageTransform(336, MEAN, STD, decoding="scaled")
    file = tmp_path / "cut.jpg"
    scan(1500, 1400).save(file)
    with pytest.raises(ImageError, match="2100000"):
        transform.read(file, max_pixels=2_000_000)
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ImageError, match="damaged"):
        transform.read(file)
    with pytest.raises(ImageError, match="can't be opened"):
        transform.read(tmp_path / "none.jpg")


def test_full_decoding_is_the_default_and_others_are_refused(tmp_path):
    file = tmp_path / "a.jpg"
    scan(1500, 1400).save(file)
    transform = ImageTransform(336, MEAN, STD)
    assert (transform.read(file) == transform(open_rgb(file))).all()
    with pytest.raises(ValueError, match="decoding must be one of full, scaled, got 'fast'"):
        ImageTransform(336, MEAN, STD, decoding="fast")


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
    found = pixels(tmp_path / f"a.{suffix}")
    assert found.shape == upright.shape
    np.testing.assert_allclose(found, upright, atol=12)


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
    monkeypatch.setattr(image_files, "_to_rgb", lambda *_: pytest.fail("decoded"))
    check_image(tmp_path / f"a.{suffix}", level="header")


def test_header_check_decodes_where_the_end_mark_is_missing(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(RGB_8).save(file)
    file.write_bytes(file.read_bytes() + b"appended by a camera" * 10)
    check_image(file, level="header")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif", "jp2", "ppm"])
def test_random_damage_raises_nothing_but_image_error(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB_8).save(file)
    data = file.read_bytes()
    generator = np.random.default_rng(0)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, min(len(data), 200), 3):
            damaged[place] = generator.integers(0, 256)
        file.write_bytes(damaged)
        try:
            check_image(file, level="decode", max_pixels=1_000_000)
        except ImageError:
            refusals += 1
    assert refusals > 5


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
    file = tmp_path / "a.png"
    Image.fromarray(RGB_8).save(file)
    assert refused(file, max_pixels=48 * 64 - 1).reason == "enormous_image"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse over 200
    with pytest.raises(Image.DecompressionBombError):
        Image.open(file)
    assert np.array_equal(np.asarray(open_rgb(file, max_pixels=48 * 64)), RGB_8)
    assert not [item for item in recwarn if issubclass(item.category, RuntimeWarning)]


def test_import_leaves_pillow_alone():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_error_takes_its_place_from_the_caller(tmp_path):
    error = refused(tmp_path / "a.png").at(dataset="d", record="r1")
    assert isinstance(error, ImageError)
    assert isinstance(error, DataError)
    assert str(error).startswith("dataset 'd', record r1: image ")
    assert error.reason == "missing_image"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unknown_level(tmp_path):
    with pytest.raises(ValueError, match="level must be"):
        check_image(tmp_path, level="deep")

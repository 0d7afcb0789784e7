# SPDX-License-Identifier: Apache-2.0

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from gmai_xtuner.core.errors import ImageError, ModelLoadError
from gmai_xtuner.core.imaging.images import open_reduced, open_rgb
from gmai_xtuner.data import images
from gmai_xtuner.data.images import ImageTransform

SHARED = Path(__file__).parents[3] / "shared" / "data"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared sample data")

RGB_8 = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


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
     (480, 641), (1000, 3), (3, 1000), (1000, 251), (251, 1003), (513, 512), (1200, 20)],
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
    for file in sorted(files)[::6]:
        plain = Image.open(file)
        image = open_rgb(file)
        if not plain.mode.startswith("I"):  # there xtuner clips 16 bit to white
            assert np.array_equal(np.asarray(image), np.asarray(plain.convert("RGB"))), file
        assert torch.equal(transform(image), xtuner_pixels(image, processor)), file
        compared += 1
    assert compared > 15


def test_long_strip_never_becomes_a_square(monkeypatch):
    strips = [Image.new("RGB", size) for size in ((12_000, 8), (8, 12_000))]
    assert max(strips[0].size) > images._LONG * min(strips[0].size)
    made = []
    real = Image.new

    def new(mode, size, *args):
        made.append(size[0] * size[1])
        return real(mode, size, *args)

    monkeypatch.setattr(Image, "new", new)
    for strip in strips:
        ImageTransform(336, MEAN, STD)(strip)
    assert made
    assert max(made) <= 336 * 336


def test_resize_mode_fills_the_square():
    image = Image.fromarray(RGB_8)
    values = ImageTransform(32, (0, 0, 0), (1, 1, 1), mode="resize")(image)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), expected, atol=1e-6)


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
    read = ImageTransform.from_pretrained(tmp_path)
    assert (read.image_size, read.mean, read.std) == (336, MEAN, STD)


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


@pytest.mark.parametrize(
    ("size", "subsampling", "mode"),
    [((1345, 1345), "4:4:4", "pad"), ((2048, 1501), "4:2:0", "pad"), ((1501, 2049), "4:2:0", "resize"),
     ((2731, 1377), "4:4:4", "resize")],
)  # fmt: skip
def test_scaled_decoding_stays_close_to_full(tmp_path, size, subsampling, mode):
    """A shift by a quarter of a pixel of the result would be 20 levels at the edges of the rings."""
    file = tmp_path / "scan.jpg"
    scan(*size).save(file, quality=92, subsampling=subsampling)
    full, scaled = read_both_ways(file, mode)
    assert not (full == scaled).all()  # it was decoded at a fraction
    assert np.abs(full - scaled).max() <= 8.5
    assert np.abs(full - scaled).mean() <= 0.5


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
    picture = scan(1400, 1344)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    deep = (np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 7
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("a.png", "a.bmp"):
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

# SPDX-License-Identifier: Apache-2.0

"""Image file -> 8-bit image, or an ImageError; the one rule for training, the corpus builder and the page.

docs/data.md (Images) says what becomes of each kind. Grey, palettes, CMYK and RGB of 8 bits are the same as
by ``Image.open(path).convert("RGB")``, which xtuner uses; it does not apply the EXIF orientation of JPEG and
PNG. What a header asks for is bounded before any of it is done: pixels, sides, their ratio, pages, scans and
the tiles of a TIFF. TIFF and JPEG 2000 are decoded in a process of their own. Nothing is opened by the name
that a file or a client gives. Paths may lead into archives.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.constants import DATA_URL
from gmai_xtuner.core.errors import GMAIError, ImageError, Unusable
from gmai_xtuner.core.files import similar_file
from gmai_xtuner.core.imaging.bounded import run_bounded
from gmai_xtuner.core.imaging.damage import find_damage
from gmai_xtuner.core.imaging.windows import HALF_OF_16_BITS, to_8_bits

PathLike = str | os.PathLike[str]

MAX_PIXELS = 178_956_970
"""Default limit on width x height: the size at which Pillow's ``Image.open`` refuses."""

MAX_SIDE = 65_535
"""Longest side in pixels, which is JPEG's own limit."""
MAX_RATIO = 1_000
"""Longer side by shorter side: beyond it the vision tower sees a third of a pixel."""
MAX_PAGES = 64
"""Pages of a TIFF, thumbnails and masks included."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, each of which passes over all pixels; writers make about ten."""
_MAX_TILE = 2**24
"""Pixels that a tile of a TIFF may always have, however small the image is."""

_APART = ("TIFF", "JPEG2000")
"""Formats whose libraries abort or allocate by what a header claims, in time and memory out of proportion."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_SHALLOW = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", *_TRANSPARENT)
_TAG = ExifTags.Base  # TIFF's own tags are among them

# What Pillow's decoders raise on damaged files (found by flipping and cutting bytes).
_DECODE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError),
    *(OverflowError, RuntimeError, struct.error, zlib.error),
)

_QUOTED = re.compile(r"b?(['\"]).*?\1|:.*", re.DOTALL)
"""What an error quotes of the file, which may be somebody's name."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_rgb(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB as a radiologist would expect to see it (see docs/data.md).

    ``max_pixels`` is the largest width x height; read from the header, before any pixel is decoded.

    Raises:
        ImageError: reason ``missing_image``, ``damaged_image``, ``enormous_image`` or
            ``unsupported_image``; without dataset and record, which the caller adds with ``at``.
    """
    with opened(path, max_pixels=max_pixels) as image:
        return _decode(image, path)[0].convert("RGB")


def decode_rgb(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of an image file as :func:`open_rgb` does; errors call it ``name``."""
    with opened(content, name, max_pixels=max_pixels) as image:
        return _decode(image, name)[0].convert("RGB")


class DecodedPixels(NamedTuple):
    """The pixels of an image file as training shows them, uint8 ``[H, W]`` or ``[H, W, 3]``.

    ``turned``: an EXIF orientation was applied, so that coordinates in the stored file don't fit. ``suffix``:
    ``.png`` or ``.jpg`` if every viewer shows the file's own coded pixels like this (8-bit grey or RGB,
    upright, opaque, one frame), else empty.
    """

    pixels: np.ndarray
    turned: bool
    suffix: str


def decode_pixels(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> DecodedPixels:
    """Decode the bytes of an image file as :func:`open_rgb` does, but keep grey as one channel.

    Damage that decoders pass over is looked for too, see `gmai_xtuner.core.imaging.damage`.
    """
    with opened(content, name, max_pixels=max_pixels) as image:
        shown, turned, suffix = _decode(image, name, content=content)
        if shown.mode == "1":
            shown = shown.convert("L")
        elif shown.mode not in ("L", "RGB"):
            is_palette = shown.mode == "P"
            shown = shown.convert("RGB")
            red, green, blue = shown.split()
            if is_palette and red.tobytes() == green.tobytes() == blue.tobytes():
                shown = red
        return DecodedPixels(np.asarray(shown), turned, suffix)


class ReducedImage(NamedTuple):
    """An RGB image that may have been decoded at a fraction, 1 / ``by``, of its whole upright ``size``.

    Pixel ``i`` stands for the pixels ``i * by`` to ``(i + 1) * by - 1`` of the file, of which the last may
    lie beyond its edge.
    """

    image: Image.Image
    size: tuple[int, int]
    by: int


def open_reduced(
    path: PathLike, *, enough: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> ReducedImage:
    """Decode like :func:`open_rgb`, but a large JPEG at 1/2, 1/4 or 1/8, which spares most of the work.

    libjpeg leaves out the high frequencies of each block of 8 x 8 pixels. Only upright grey and colour
    JPEG is reduced; CMYK, an EXIF rotation and every other format come whole. ``enough`` pixels are kept of
    the longer and the shorter edge at least; ``max_pixels`` is of the whole size.
    """
    with opened(path, max_pixels=max_pixels) as image:
        size = image.size
        by = min(max(size) // enough[0], min(size) // enough[1])
        by = next((step for step in (8, 4, 2) if step <= by), 1)
        upright_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if by > 1 and upright_jpeg and orientation_of(image) == 1:
            image.draft(None, (size[0] // by, size[1] // by))
        else:
            by = 1
        rgb = _decode(image, path)[0].convert("RGB")
        return ReducedImage(rgb, rgb.size if by == 1 else size, by)


def check_image(path: PathLike, *, level: str, max_pixels: int = MAX_PIXELS) -> None:
    """Find a bad image without keeping it, or raise ImageError as :func:`open_rgb`.

    ``level`` ``"exists"`` looks at the directory entry only; ``"header"`` reads size, mode and the format's
    end mark (a file without one is decoded whole); ``"decode"`` decodes, and looks for damage that decoders
    pass over.
    """
    if level == "exists":
        if not os.path.isfile(path):  # False too for a name that no file can have
            if (found := locate(path)) is None:
                raise _missing(path, "no such file")
            found[0].check(found[1], os.fspath(path))
    elif level == "header":
        with opened(path, max_pixels=max_pixels) as image:
            # A float may be NaN anywhere; everything else shows in header and end mark.
            if image.mode == "F" or not _reaches_its_end(image):
                _decode(image, path)
    elif level == "decode":
        with opened(path, max_pixels=max_pixels) as image:
            _decode(image, path, content=_file_content(image))
    else:
        raise ValueError(f'level must be "exists", "header" or "decode", got {level!r}.')


_UNSUPPORTED = "unsupported_image"
_SMALLER = "Cut it into tiles or shrink it."
_AGAIN = "Copy the file again from its source."
_AS_RGB = "Save it as 8 bit RGB."
_ONE_FILE = "Save the {} that the text speaks of as a file of its own."


def _error(name: PathLike, problem: str, reason: str, remedy: str | None = None) -> ImageError:
    return ImageError(f"image {str(name)!r} {problem}", remedy=remedy, reason=reason)


def _missing(path: PathLike, why: str) -> ImageError:
    remedy = "Check image_root in the mixture file, or drop the record."
    if (meant := similar_file(os.fspath(path))) is not None:
        remedy = f"Did you mean {meant!r}? Names are taken letter by letter. Otherwise: {remedy}"
    return _error(path, f"can't be opened ({why})", "missing_image", remedy)


@contextmanager
def opened(
    source: PathLike | bytes, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image, a file or bytes called ``name``, within the bounds; for header or pixels as stored.

    Errors of decoding inside the block become ImageErrors too, as of :func:`open_rgb`.
    """
    shown: PathLike = name
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    else:
        text = os.fspath(source)
        shown = text if (at := text.find(DATA_URL)) < 0 else text[at : at + 40]
        try:
            file = open(source, "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            if (found := locate(source)) is None:
                raise _missing(source, str(error)) from error
            file = io.BytesIO(found[0].content(found[1], text))
    with file, _documented_errors(shown):
        image = _read_header(file, shown)
        if problem := _problem(image, max_pixels):
            raise _error(shown, *problem)
        yield image


@contextmanager
def _documented_errors(name: PathLike) -> Iterator[None]:
    try:
        yield
    except GMAIError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:  # the first: a huge frame of a GIF
        why = str(error) or "there is not enough memory to decode it"
        raise _error(name, f"is too large: {why}", "enormous_image", _SMALLER) from error
    except _DECODE_ERRORS as error:
        why = f"{type(error).__name__}: {_QUOTED.sub('', str(error)).strip()[:200]}"
        problem = f"is damaged, or of a kind that can't be decoded ({why})"
        remedy = f"{_AGAIN[:-1]}, or save it anew as PNG or JPEG."
        raise _error(name, problem, "damaged_image", remedy) from error


def _read_header(file: BinaryIO, name: PathLike) -> Image.Image:
    # Image.open compares each size with a limit that belongs to the whole process, and warns or
    # raises. Asking the registered formats directly leaves the decision to our own max_pixels.
    Image.init()
    prefix = file.read(16)
    for kind in _FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept is not None and accept(prefix) is True:
            file.seek(0)
            try:
                # Not by its name: Pillow maps the file of that name into memory where it can.
                return factory(file, "")
            except SyntaxError as error:
                if "unknown pixel mode" not in str(error):  # a whole TIFF, such as float64
                    raise
                problem = f"is a {kind} whose kind of pixel can't be decoded"
                remedy = "Save it as 8 or 16 bit integers or 32 bit floats."
                raise _error(name, problem, _UNSUPPORTED, remedy) from error
    if not prefix:
        raise _error(name, "is empty (0 bytes)", "damaged_image", _AGAIN)
    problem = f"is in none of the formats {', '.join(_FORMATS)}"
    remedy = "Convert it to PNG; volumes and DICOM go through the corpus builder."
    raise _error(name, problem, _UNSUPPORTED, remedy)


def _problem(image: Image.Image, max_pixels: int) -> tuple[str, str, str | None] | None:
    """Return what speaks against decoding an opened image, with its reason and remedy."""
    width, height = image.size
    size, large = f"{width} x {height}", "enormous_image"
    if min(image.size) < 1:
        return f"has no pixels ({size})", "damaged_image", None
    if width * height > max_pixels:
        problem = f"has {size} = {width * height} pixels, the limit is {max_pixels}"
        return problem, large, f"{_SMALLER[:-1]}, or raise max_pixels."
    if max(image.size) > MAX_SIDE or max(image.size) > MAX_RATIO * min(image.size):
        limits = f"the limits are {MAX_SIDE} a side, and {MAX_RATIO} times the other"
        return f"has {size} pixels; {limits}", large, _SMALLER
    if (
        image.info.get("progressive")
        and (scans := _file_content(image).count(b"\xff\xda")) > MAX_SCANS
    ):
        return f"is a JPEG of {scans} scans, the limit is {MAX_SCANS}", large, "Save it anew."
    if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        return f"is a moving {image.format}", _UNSUPPORTED, _ONE_FILE.format("frame")
    if image.mode not in _SHALLOW + _DEEP_GREY:
        return f"has the colour mode {image.mode}", _UNSUPPORTED, _AS_RGB
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    bits: Any = image.tag_v2.get(_TAG.BitsPerSample, (1,))
    if (
        image.tag_v2.get(_TAG.PlanarConfiguration) == 2
        and max(bits if isinstance(bits, tuple) else (bits,)) > 8
    ):
        # Pillow 13 and OpenCV 5 both read these planes as noise, without an error.
        problem = f"is a TIFF with a separate plane of {bits} bits for each channel"
        remedy = "Save it with interleaved channels (PlanarConfiguration 1), or as PNG."
        return problem, _UNSUPPORTED, remedy
    tile = image.tag_v2.get(_TAG.TileWidth, 1) * image.tag_v2.get(_TAG.TileLength, 1)
    if tile > max(_MAX_TILE, 4 * width * height):
        return f"is a TIFF of {size} pixels in tiles of {tile}", large, "Save it anew."
    if pages := _pages(image):
        return f"is a TIFF {pages}", _UNSUPPORTED, _ONE_FILE.format("page")
    return None


def _file_content(image: Any) -> bytes:
    """Return the bytes of an opened image's file, which stays where it was."""
    position = image.fp.tell()
    image.fp.seek(0)
    content: bytes = image.fp.read()
    image.fp.seek(position)
    return content


def _pages(image: TiffImagePlugin.TiffImageFile) -> str:
    """Return what is wrong with the further pages: they are no thumbnail or mask, or too many; else ""."""
    width, height = size = image.size
    try:
        for page in range(1, MAX_PAGES):  # n_frames would read the headers of all pages
            image.seek(page)
            reduced_or_mask = image.tag_v2.get(_TAG.NewSubfileType, 0) & 0b101
            if image.size == size and not reduced_or_mask:
                return f"stack of several pages of {width} x {height} pixels"
    except EOFError:  # no more pages
        return ""
    finally:
        image.seek(0)
    return f"of {MAX_PAGES} or more pages"


def _reaches_its_end(image: Any) -> bool:
    """Return True on a cheap sign that a file is whole; False means "not known"."""
    file: BinaryIO = image.fp
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(0)
    start = file.read(8)
    ends = {
        "JPEG": tail.rstrip(b"\0").endswith(b"\xff\xd9"),
        "PNG": b"IEND\xaeB`\x82" in tail,
        "GIF": tail.endswith(b";"),
        "WEBP": int.from_bytes(start[4:8], "little") + 8 <= size,
    }
    if image.format == "TIFF":
        tags = image.tag_v2
        offsets = tags.get(_TAG.StripOffsets) or tags.get(_TAG.TileOffsets) or ()
        counts = tags.get(_TAG.StripByteCounts) or tags.get(_TAG.TileByteCounts) or ()
        return len(offsets) == len(counts) > 0 and all(
            offset + count <= size for offset, count in zip(offsets, counts, strict=True)
        )
    return ends.get("JPEG" if image.format == "MPO" else image.format, False)


_Decoded = tuple[Image.Image, bool, str]


def _decode(image: Image.Image, name: PathLike, *, content: bytes | None = None) -> _Decoded:
    """Return the image upright, 8-bit and opaque, of any mode, and the rest of `DecodedPixels`.

    With the file's ``content``, damage that decoders pass over is looked for too.
    """
    if image.format not in _APART:
        return _decode_here(image, name, content)
    memory = min(2**32, 2**28 + 40 * image.width * image.height)
    whole, look = content or _file_content(image), content is not None
    try:
        return run_bounded(_decode_again, whole, str(name), look, memory=memory, seconds=60)
    except Unusable as error:
        raise _error(name, f"is damaged ({error})", "damaged_image", _AGAIN) from error


def _decode_again(whole: bytes, name: str, look: bool) -> _Decoded:
    """Decode the bytes of a file whose header is within the bounds, in a worker."""
    with opened(whole, name, max_pixels=2**63) as image:
        shown, turned, suffix = _decode_here(image, name, whole if look else None)
    plain = shown.copy()
    plain.info = {}
    return plain, turned, suffix


def _decode_here(image: Any, name: PathLike, content: bytes | None) -> _Decoded:
    # What is asked before loading, after which Pillow has forgotten it.
    file, tiles = getattr(image, "fp", None), getattr(image, "tile", ())
    may_be_deep = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA", "RGBX", "LA")
    has_16_bit_colour = may_be_deep and any(";16" in str(tile[3]) for tile in tiles)
    # Pillow turns a TIFF while it loads it, and forgets that it did.
    is_tiff = image.format == "TIFF"
    before = orientation_of(image) if is_tiff else 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # What Pillow would do itself, but for its own limit, which max_pixels may exceed.
        image.im = Image.core.new(image.mode, getattr(image, "_tile_size", image.size))
    image.load()
    orientation = before if is_tiff else orientation_of(image)
    if damage := find_damage(content, image) if content is not None else "":
        raise _error(name, f"is damaged ({damage})", "damaged_image", _AGAIN)
    # Signed bytes are unsigned to Pillow.
    if image.mode in _DEEP_GREY or (is_tiff and image.tag_v2.get(_TAG.SampleFormat) == (2,)):
        shown = Image.fromarray(_deep_grey(image, name))
    else:
        shown = _deep_colour(image, name, file) if has_16_bit_colour else _over_black(image)
    if orientation != 1:
        return shown if is_tiff else shown.transpose(_UPRIGHT[orientation]), True, ""
    as_stored = shown is image and image.mode in ("L", "RGB") and getattr(image, "n_frames", 1) == 1
    return shown, False, {"PNG": ".png", "JPEG": ".jpg"}.get(image.format, "") if as_stored else ""


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's 1 to 8; 1, which is upright, if the file says nothing that can be parsed."""
    if (
        image.format == "PNG"
    ):  # EXIF may stand behind the pixels, whose damage is not to be lost here
        image.load()
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1
    return value if value in _UPRIGHT else 1


def _over_black(image: Image.Image) -> Image.Image:
    """Lay the transparency of an 8-bit image, if there is any, over black."""
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return rgba.getchannel("R") if image.mode in ("L", "LA", "La") else rgba.convert("RGB")


def _deep_grey(image: Any, name: PathLike) -> np.ndarray:
    is_tiff = image.format == "TIFF"
    white_is_zero = is_tiff and image.tag_v2.get(_TAG.PhotometricInterpretation) == 0
    levels = np.asarray(image)
    levels = levels if image.mode in _DEEP_GREY else levels.view(np.int8)
    transparent = image.info.get("transparency")
    visible = levels != transparent if isinstance(transparent, int) else None
    try:
        grey = to_8_bits(levels, visible=visible)
    except ValueError as error:
        raise _error(name, str(error), _UNSUPPORTED, "Save it anew with finite values.") from error
    grey = 255 - grey if white_is_zero else grey
    return grey if visible is None else np.where(visible, grey, np.uint8(0))


def _deep_colour(image: Image.Image, name: PathLike, file: BinaryIO | None) -> Image.Image:
    """Return the 8-bit form of a 16-bit colour image, of which Pillow gives the high bytes."""
    high_bytes = image.convert("RGBA") if image.mode in ("RGBA", "LA") else image.convert("RGB")
    extrema: Any = high_bytes.getextrema()
    low, high = min(pair[0] for pair in extrema[:3]), max(pair[1] for pair in extrema[:3])
    names_a_colour = "transparency" in image.info
    if high - low >= HALF_OF_16_BITS >> 8 and not names_a_colour:
        return _over_black(high_bytes)
    if names_a_colour or (len(extrema) == 4 and extrema[3] != (255, 255)):
        raise _error(name, "is 16 bit colour with transparency", _UNSUPPORTED, _AS_RGB)
    import cv2

    levels = None
    if file is not None:
        file.seek(0)
        data = np.frombuffer(file.read(), dtype=np.uint8)
        levels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if levels is None or levels.dtype != np.uint16 or levels.shape[:2] != image.size[::-1]:
        problem = "is 16 bit colour of a kind that can't be decoded"
        raise _error(name, problem, _UNSUPPORTED, _AS_RGB)
    if levels.ndim == 3:
        levels = np.ascontiguousarray(levels[:, :, 2::-1])
    return Image.fromarray(to_8_bits(levels))

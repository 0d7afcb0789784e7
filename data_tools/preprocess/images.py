"""A picture of a source -> a picture file of the corpus, named by its pixels.

A file is kept as it is if it is a PNG or JPEG of 8 bit grey or colour that every program shows alike: no
rotation by EXIF, no transparency, one frame. Only blocks of text and EXIF are taken out of it, which may say
who the patient is; the coded pixels stay byte for byte. Everything else becomes a PNG of 8 bit grey or RGB:

* **16 bit**: a picture whose values span half of the 16 bits or more keeps its high byte, so it equals its
  8 bit twin. A narrower one holds 10, 12 or 14 bit values of a scanner, perhaps with an offset: the window
  from its own smallest to its own largest value becomes 0..255. Colour shares one window, so the hue stays.
* **32 bit integers and floats**: the same window. NaN or infinity is refused.
* **TIFF with white as zero**: turned to black as zero. **EXIF orientation** is applied. **Transparency** lies
  over black. **Several frames**: the first of GIF, WebP and PNG; a TIFF stack of equal pages is refused.

The trainer decodes pictures by the same rules, so what the corpus shows is what the model sees.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

MAX_PIXELS = 178_956_970
"""Largest width x height, read from the header before any pixel is decoded; Pillow's own limit as well."""

MAX_BYTES = 4 * 2**30
_HALF_OF_16_BITS = 2**15
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_SHALLOW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class BadImage(ValueError):
    """A picture that is left out.

    Args:
        reason: the same words for all of the kind.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture of the corpus.

    Args:
        path: below the folder that was given, with ``/``: ``ab/abcdef....png``; the hash of the pixels and,
            of a file that was kept, of its bytes.
        pixels: the hash of the pixels alone.
        width, height: pixels, upright.
        turned: whether EXIF orientation was applied, so that coordinates of the file as stored don't fit.
    """

    path: str
    pixels: str
    width: int
    height: int
    turned: bool = False


def store_image(
    image: Path | np.ndarray, folder: Path, *, max_pixels: int = MAX_PIXELS
) -> StoredImage:
    """Put a picture into a folder under the hash of its pixels, unless it is there.

    The file is written aside and renamed, so several processes may store the same picture at once.

    Args:
        image: picture file, or uint8 or deeper ``[H, W]`` or ``[H, W, 3]``.
        folder: of the pictures.
        max_pixels: largest width x height.

    Raises:
        BadImage: with the reason ``"image can't be read"``, ``"image is truncated"``,
            ``"image is too large"``, ``"image is of an unsupported kind"`` or ``"picture of one grey
            level"``.
    """
    if isinstance(image, np.ndarray):
        pixels, data, suffix, turned = _from_array(image, max_pixels), None, ".png", False
    else:
        pixels, data, suffix, turned = _from_file(image, max_pixels)
    first = pixels[:1, :1]
    if pixels[0, 0].tobytes() == pixels[-1, -1].tobytes() and (pixels == first).all():
        raise BadImage("picture of one grey level", f"every pixel is {first.ravel().tolist()}")
    height, width = pixels.shape[:2]
    name = pixel_hash(pixels)
    # Two files of the same pixels may differ in their bytes: which of them is kept must not be a race.
    kept = f"-{hashlib.blake2b(data, digest_size=4).hexdigest()}" if data is not None else ""
    path = f"{name[:2]}/{name}{kept}{suffix}"
    target = folder / path
    if not target.exists():
        _write(target, data if data is not None else _png(pixels))
    return StoredImage(path, name, width, height, turned)


def read_pixels(image: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a picture as the corpus shows them: 8 bit, upright, nothing see-through.

    Args:
        image: picture file, or the bytes of one.
        max_pixels: largest width x height.

    Returns:
        uint8 ``[H, W]`` or ``[H, W, 3]``.

    Raises:
        BadImage: with the reasons of :func:`store_image`, but a picture of one grey level is a picture.
    """
    if isinstance(image, bytes):
        return _from_bytes(image, max_pixels)[0]
    return _from_file(image, max_pixels)[0]


def pixel_hash(pixels: np.ndarray) -> str:
    """32 hexadecimal digits that say which pixels these are, and in which shape.

    Args:
        pixels: uint8 ``[H, W]`` or ``[H, W, 3]``.
    """
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    digest.update(f"{width}x{height}x{1 if pixels.ndim == 2 else 3}".encode())
    return digest.hexdigest()


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 3 writes twice as fast as the default and 5 % larger.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


# --- files --------------------------------------------------------------------------------------


def _from_file(path: Path, max_pixels: int) -> tuple[np.ndarray, bytes | None, str, bool]:
    """Pixels uint8, the file's bytes if they are kept, suffix, whether it was turned."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImage("image is too large", f"{path.stat().st_size} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage("image can't be read", _short(error)) from error
    return _from_bytes(data, max_pixels)


def _from_bytes(data: bytes, max_pixels: int) -> tuple[np.ndarray, bytes | None, str, bool]:
    if not data:
        raise BadImage("image is truncated", "0 bytes")
    try:
        image = _open(data, max_pixels)
        return _decode(image, data)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("image is too large", _short(error)) from error
    except MemoryError as error:
        raise BadImage("image is too large", "not enough memory to decode it") from error
    except _DECODE_ERRORS as error:
        cut = any(word in str(error).lower() for word in ("truncated", "unexpected end", "eof"))
        reason = (
            "image is truncated" if cut or isinstance(error, EOFError) else "image can't be read"
        )
        raise BadImage(reason, _short(error)) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The header. Pillow's limit of pixels belongs to the whole process and is neither used nor changed."""
    Image.init()
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is True:
            image = factory(io.BytesIO(data), "")
            break
    else:
        raise BadImage(
            "image can't be read",
            f"it is in none of the formats {', '.join(_FORMATS)} (it begins with {data[:8]!r})",
        )
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(
            "image is too large", f"{width} x {height} pixels, the limit is {max_pixels} in all"
        )
    if width < 1 or height < 1:
        raise BadImage("image can't be read", f"it has no pixels ({width} x {height})")
    if image.mode not in _SHALLOW + _DEEP:
        raise BadImage("image is of an unsupported kind", f"colour mode {image.mode}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    return image


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    bits: Any = image.tag_v2.get(258, (1,))
    if image.tag_v2.get(284) == 2 and max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        # Pillow and OpenCV read these planes as noise, without an error.
        raise BadImage("image is of an unsupported kind", "TIFF of separate planes of 16 bit")
    size = image.size
    try:
        for page in range(1, getattr(image, "n_frames", 1)):
            image.seek(page)
            reduced_or_mask = image.tag_v2.get(254, 0) & 0b101
            if image.size == size and not reduced_or_mask:
                raise BadImage(
                    "image is of an unsupported kind",
                    "TIFF stack of several pages; read it with the reader `volume`",
                )
    finally:
        image.seek(0)


def _decode(image: Image.Image, data: bytes) -> tuple[np.ndarray, bytes | None, str, bool]:
    deep_colour = (
        image.format in ("PNG", "TIFF")
        and image.mode in ("RGB", "RGBA", "RGBX", "LA")
        and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    )
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    frames = getattr(image, "n_frames", 1)
    image.load()
    turned = _orientation(image) not in (0, 1)
    if image.mode in _DEEP:
        pixels = _deep_grey(np.asarray(image), image.info.get("transparency"), white_is_zero)
    elif deep_colour:
        pixels = _deep_colour(image, data)
    else:
        see_through = "transparency" in image.info or image.mode in (
            "LA",
            "La",
            "PA",
            "RGBA",
            "RGBa",
        )
        pixels = np.asarray(_over_black(image) if see_through else _plain(image))
        suffix = {"PNG": ".png", "JPEG": ".jpg"}.get(image.format or "")
        if suffix and not see_through and not turned and frames == 1 and image.mode in ("L", "RGB"):
            kept = (_png_without_text if suffix == ".png" else _jpeg_without_text)(data)
            return pixels, kept, suffix if kept else ".png", False
    if turned:
        upright = ImageOps.exif_transpose(_with_exif(Image.fromarray(pixels), image))
        pixels = np.asarray(upright)
    return pixels, None, ".png", turned


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1  # an EXIF block that can't be parsed names no orientation; the pixels are whole
    return value if value in range(1, 9) else 1


def _with_exif(pixels: Image.Image, image: Image.Image) -> Image.Image:
    exif = pixels.getexif()
    exif[ExifTags.Base.Orientation] = _orientation(image)
    return pixels


def _plain(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    rgb = image.convert("RGB")
    if image.mode == "P":  # a grey palette is a grey picture
        red, green, blue = rgb.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            return red
    return rgb


def _over_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    grey = image.mode in ("L", "LA", "La")
    if rgba.getchannel("A").getextrema() != (255, 255):
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    rgb = rgba.convert("RGB")
    return rgb.getchannel("R") if grey else rgb


# --- text in files ------------------------------------------------------------------------------


def _png_without_text(data: bytes) -> bytes | None:
    """The file with the chunks that make the picture; None (it is written anew) if it can't be followed."""
    keep = (
        b"IHDR",
        b"PLTE",
        b"IDAT",
        b"IEND",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"iCCP",
        b"sBIT",
        b"pHYs",
    )
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data):
            return None
        if kind in keep:
            parts.append(data[at:end])
        at = end
        if kind == b"IEND":
            return b"".join(parts)
    return None


def _jpeg_without_text(data: bytes) -> bytes | None:
    """The file without comments and application data, but for JFIF, ICC and Adobe's colour transform.

    None (it is written anew as PNG) if its segments can't be followed.
    """
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            return None
        body = data[at + 4 : end]
        is_text = marker == 0xFE or 0xE0 <= marker <= 0xEF
        if not is_text or marker == 0xEE or body.startswith((b"JFIF\0", b"ICC_PROFILE\0")):
            parts.append(data[at:end])
        at = end
        if marker == 0xDA:  # the coded pixels begin, up to the end marker
            last = data.rfind(b"\xff\xd9")
            return b"".join([*parts, data[at : last + 2]]) if last >= at else None
    return None


# --- grey levels --------------------------------------------------------------------------------


def _deep_grey(levels: np.ndarray, transparent: Any, white_is_zero: bool) -> np.ndarray:
    visible = levels != transparent if isinstance(transparent, int) else None
    grey = to_8_bits(levels, visible=visible)
    if white_is_zero:
        grey = 255 - grey
    return grey if visible is None else np.where(visible, grey, np.uint8(0))


def _deep_colour(image: Image.Image, data: bytes) -> np.ndarray:
    """8 bit RGB of a 16 bit colour file, of which Pillow gives the high bytes."""
    if "transparency" in image.info:
        raise BadImage("image is of an unsupported kind", "16 bit colour with a transparent colour")
    high_bytes = image.convert("RGBA") if image.mode in ("RGBA", "LA") else image.convert("RGB")
    extrema: Any = high_bytes.getextrema()
    low, high = min(pair[0] for pair in extrema[:3]), max(pair[1] for pair in extrema[:3])
    if high - low >= _HALF_OF_16_BITS >> 8:
        return np.asarray(
            _over_black(high_bytes) if high_bytes.mode == "RGBA" else high_bytes, dtype=np.uint8
        )
    if len(extrema) == 4 and extrema[3] != (255, 255):
        raise BadImage("image is of an unsupported kind", "16 bit colour with transparency")
    import cv2

    levels = cv2.imdecode(
        np.frombuffer(data, dtype=np.uint8),
        cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION,
    )
    if levels is None or levels.dtype != np.uint16 or levels.shape[:2] != image.size[::-1]:
        raise BadImage("image is of an unsupported kind", "16 bit colour that can't be decoded")
    if levels.ndim == 2:
        return to_8_bits(levels)
    return to_8_bits(np.ascontiguousarray(levels[:, :, 2::-1]))


def to_8_bits(levels: np.ndarray, *, visible: np.ndarray | None = None) -> np.ndarray:
    """Deep levels -> uint8 of the same shape; the rule is in the module's docstring.

    Args:
        levels: integers or floats.
        visible: mask of the pixels that count for the window; default all.

    Raises:
        BadImage: NaN or infinity.
    """
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise BadImage("image is of an unsupported kind", "it holds NaN or infinite values")
    shown = levels if visible is None or not visible.any() else levels[visible]
    low, high = shown.min().item(), shown.max().item()
    is_16_bit = levels.dtype.kind != "f" and low >= 0 and high <= 65535
    if is_16_bit and (high == low or high - low >= _HALF_OF_16_BITS):
        return (levels.clip(0, 65535) >> 8).astype(np.uint8)
    if high == low:
        return np.zeros(levels.shape, dtype=np.uint8)
    scaled = (levels.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _from_array(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
        raise BadImage("image can't be read", f"an array of shape {pixels.shape}")
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise BadImage(
            "image is too large",
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels, the limit is {max_pixels} in all",
        )
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype != np.uint8:
        pixels = to_8_bits(pixels)
    return np.ascontiguousarray(pixels)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]

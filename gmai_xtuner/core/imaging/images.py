"""Image file -> RGB picture, or an ImageError.

What a file becomes (:func:`open_rgb`), and why:

* **8 bit grey, palette, 1 bit, CMYK, RGB**: Pillow's own conversion, the same picture as
  ``Image.open(path).convert("RGB")``, which xtuner uses.
* **16 bit grey and colour**: scaled, never clipped. A file whose values span half of the 16 bits or
  more keeps its high byte, so it equals its 8 bit twin. A narrower file holds 10, 12 or 14 bit
  values of a scanner (perhaps with an offset, such as Hounsfield units + 32768): the window from
  its own smallest to its own largest value becomes 0..255, as a viewer shows it. Colour shares
  one window over the three channels, so the hue stays.
* **32 bit integers and floats**: the same window. NaN or infinity is refused.
* **TIFF with white as zero** (PhotometricInterpretation 0): turned to black as zero, at any depth.
* **Alpha**: opaque alpha is dropped. Real transparency lies over black, the ground of radiographs,
  CT and MR, and the value that most writers leave in invisible pixels, where
  ``convert("RGB")`` shows it too.
* **EXIF orientation** is applied: a photograph's text says "left" of what a viewer shows. (Pillow
  does so for TIFF in any case; xtuner does not for JPEG and PNG.)
* **Several pages or frames**: the first frame of GIF, WebP and PNG; the first page of a TIFF whose
  other pages are thumbnails, masks or of another size. A TIFF stack of equal pages is refused:
  which slice the text speaks of is not ours to guess.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from gmai_xtuner.core.errors import ImageError

MAX_PIXELS = 178_956_970
"""Default limit on width x height: the size at which Pillow's ``Image.open`` refuses."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_SHALLOW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_HALF_OF_16_BITS = 2**15

# What Pillow's decoders raise on damaged files (found by flipping and cutting bytes).
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

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_rgb(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB as a radiologist would expect to see it (see the module).

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP, GIF, JPEG 2000 or PNM file.
        max_pixels: largest width x height; read from the header, before any pixel is decoded.
            Pillow's global limit is neither used nor changed.

    Raises:
        ImageError: reason ``missing_image``, ``damaged_image``, ``enormous_image`` or
            ``unsupported_image``; without dataset and record, which the caller adds with ``at``.
    """
    with _opened(path, max_pixels=max_pixels) as image:
        return _to_rgb(image, path)


def decode_rgb(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As :func:`open_rgb`, for the bytes of a file that stands inside another.

    Args:
        content: the file.
        name: what errors call it.
        max_pixels: largest width x height.

    Raises:
        ImageError: as :func:`open_rgb`.
    """
    with _decoded(io.BytesIO(content), name, max_pixels=max_pixels) as image:
        return _to_rgb(image, name)


class ReducedPicture(NamedTuple):
    """A picture that may have been decoded at a fraction of its size.

    Args:
        image: RGB; pixel ``i`` stands for the pixels ``i * by`` to ``(i + 1) * by - 1`` of the file, of
            which the last may lie beyond its edge.
        size: width and height of the whole picture, upright.
        by: 1, 2, 4 or 8.
    """

    image: Image.Image
    size: tuple[int, int]
    by: int


def open_reduced(
    path: str | os.PathLike[str], *, enough: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> ReducedPicture:
    """As :func:`open_rgb`, but a large JPEG is decoded at 1/2, 1/4 or 1/8, which spares most of the work.

    libjpeg leaves out the high frequencies of each block of 8 x 8 pixels. Only upright grey and colour
    JPEG is reduced; CMYK, an EXIF rotation and every other format come whole.

    Args:
        path: see :func:`open_rgb`.
        enough: pixels that the longer and the shorter edge keep at least.
        max_pixels: see :func:`open_rgb`; compared with the whole size.

    Raises:
        ImageError: as :func:`open_rgb`.
    """
    with _opened(path, max_pixels=max_pixels) as image:
        size = image.size
        by = min(max(size) // enough[0], min(size) // enough[1])
        by = next((step for step in (8, 4, 2) if step <= by), 1)
        upright_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if by > 1 and upright_jpeg and _orientation(image) == 1:
            image.draft(None, (size[0] // by, size[1] // by))
            return ReducedPicture(_to_rgb(image, path), size, by)
        rgb = _to_rgb(image, path)
        return ReducedPicture(rgb, rgb.size, 1)


def check_image(path: str | os.PathLike[str], *, level: str, max_pixels: int = MAX_PIXELS) -> None:
    """Find a bad image without keeping it.

    Args:
        path: the file.
        level: ``"exists"`` looks at the directory entry only; ``"header"`` reads size, mode and the
            format's end mark (a file without one is decoded whole); ``"decode"`` decodes.
        max_pixels: see :func:`open_rgb`; used by ``"header"`` and ``"decode"``.

    Raises:
        ImageError: as :func:`open_rgb` (``"exists"``: ``missing_image`` only).
    """
    if level == "exists":
        if not _is_file(path):
            raise _missing(path)
    elif level == "header":
        with _opened(path, max_pixels=max_pixels) as image:
            # A float may be NaN anywhere; everything else shows in header and end mark.
            if image.mode == "F" or not _reaches_its_end(image):
                _to_rgb(image, path)
    elif level == "decode":
        open_rgb(path, max_pixels=max_pixels)
    else:
        raise ValueError(f'level must be "exists", "header" or "decode", got {level!r}.')


# --- opening ------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str | os.PathLike[str], *, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file, check what its header says, and turn decoding errors into ImageError."""
    with _open_file(path) as file, _decoded(file, path, max_pixels=max_pixels) as image:
        yield image


@contextmanager
def _decoded(
    file: BinaryIO, path: str | os.PathLike[str], *, max_pixels: int
) -> Iterator[Image.Image]:
    try:
        image = _read_header(file, path)
        _check_header(image, path, max_pixels=max_pixels)
        yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # a GIF frame larger than its screen
        raise ImageError(
            f"image {str(path)!r}: {error}",
            remedy="Cut it into tiles or shrink it.",
            reason="enormous_image",
        ) from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"image {str(path)!r} is damaged, or of a kind that can't be decoded "
            f"({type(error).__name__}: {error})",
            remedy="Copy the file again from its source, or save it anew as PNG or JPEG.",
            reason="damaged_image",
        ) from error


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _missing(path, why=str(error)) from error


def _read_header(file: BinaryIO, path: str | os.PathLike[str]) -> Image.Image:
    # Image.open compares each size with a limit that belongs to the whole process, and warns or
    # raises. Asking the registered formats directly leaves the decision to our own max_pixels.
    Image.init()
    prefix = file.read(16)
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(prefix) is True:
            file.seek(0)
            try:
                return factory(file, os.fspath(path))
            except SyntaxError as error:
                if "unknown pixel mode" not in str(error):  # a whole TIFF, such as float64
                    raise
                raise ImageError(
                    f"image {str(path)!r} is a {name} whose kind of pixel can't be decoded",
                    remedy="Save it as 8 or 16 bit integers or 32 bit floats.",
                    reason="unsupported_image",
                ) from error
    if not prefix:
        raise ImageError(
            f"image {str(path)!r} is empty (0 bytes)",
            remedy="Copy the file again from its source.",
            reason="damaged_image",
        )
    raise ImageError(
        f"image {str(path)!r} is in none of the formats {', '.join(_FORMATS)} "
        f"(it begins with {prefix[:8]!r})",
        remedy="Convert it to PNG; volumes and DICOM go through the corpus builder.",
        reason="unsupported_image",
    )


def _check_header(image: Image.Image, path: str | os.PathLike[str], *, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"image {str(path)!r} has {width} x {height} = {width * height} pixels, "
            f"the limit is {max_pixels}",
            remedy="Cut it into tiles or shrink it, or raise max_pixels.",
            reason="enormous_image",
        )
    if width < 1 or height < 1:
        raise ImageError(
            f"image {str(path)!r} has no pixels ({width} x {height})", reason="damaged_image"
        )
    if image.mode not in _SHALLOW + _DEEP_GREY:
        raise ImageError(
            f"image {str(path)!r} has the colour mode {image.mode}",
            remedy="Save it as 8 bit RGB.",
            reason="unsupported_image",
        )
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    bits = image.tag_v2.get(258, (1,))
    if image.tag_v2.get(284) == 2 and max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        # Pillow 13 and OpenCV 5 both read these planes as noise, without an error.
        raise ImageError(
            f"image {str(path)!r} is a TIFF with a separate plane of {bits} bits for each channel",
            remedy="Save it with interleaved channels (PlanarConfiguration 1), or as PNG.",
            reason="unsupported_image",
        )
    if _is_stack(image):
        raise ImageError(
            f"image {str(path)!r} is a TIFF stack of several pages of {width} x {height} pixels",
            remedy="Save the page that the text speaks of as a file of its own.",
            reason="unsupported_image",
        )


def _is_stack(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether a further page is neither thumbnail nor mask and has the size of the first."""
    size = image.size
    try:
        for page in range(1, getattr(image, "n_frames", 1)):
            image.seek(page)
            reduced_or_mask = image.tag_v2.get(254, 0) & 0b101
            if image.size == size and not reduced_or_mask:
                return True
        return False
    finally:
        image.seek(0)


def _is_file(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:
        return False


def _missing(path: str | os.PathLike[str], *, why: str = "no such file") -> ImageError:
    return ImageError(
        f"image {str(path)!r} can't be opened ({why})",
        remedy="Check image_root in the mixture file, or drop the record.",
        reason="missing_image",
    )


def _reaches_its_end(image: Any) -> bool:
    """Cheap sign that a file is whole; False means "not known"."""
    file: BinaryIO = image.fp
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(0)
    start = file.read(8)
    if image.format in ("JPEG", "MPO"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if image.format == "PNG":
        return b"IEND\xaeB`\x82" in tail
    if image.format == "GIF":
        return tail.endswith(b";")
    if image.format == "WEBP":
        return int.from_bytes(start[4:8], "little") + 8 <= size
    if image.format == "TIFF":
        offsets = image.tag_v2.get(273) or image.tag_v2.get(324) or ()
        counts = image.tag_v2.get(279) or image.tag_v2.get(325) or ()
        return len(offsets) == len(counts) > 0 and all(
            offset + count <= size for offset, count in zip(offsets, counts, strict=True)
        )
    return False


# --- pixels -------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    is_16_bit_colour = (
        image.format in ("PNG", "TIFF")
        and image.mode in ("RGB", "RGBA", "RGBX", "LA")
        and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    )
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode in _DEEP_GREY:
        rgb = _grey_to_rgb(image, path, white_is_zero=white_is_zero)
    elif is_16_bit_colour:
        rgb = _deep_colour_to_rgb(image, path, turned=turn is not None)
    else:
        rgb = _over_black(image)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1  # an EXIF block that can't be parsed names no orientation; the pixels are whole


def _over_black(image: Image.Image) -> Image.Image:
    """RGB of a decoded 8 bit picture; transparency, if there is any, over black."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # a plain Image, free of the file
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, rgba).convert("RGB")


def _grey_to_rgb(
    image: Image.Image, path: str | os.PathLike[str], *, white_is_zero: bool
) -> Image.Image:
    levels = np.asarray(image)
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ImageError(
            f"image {str(path)!r} holds NaN or infinite values",
            remedy="Save it anew with finite values.",
            reason="unsupported_image",
        )
    transparent = image.info.get("transparency") if levels.dtype.kind == "u" else None
    visible = None if transparent is None else levels != transparent
    grey = _scale_to_8_bits(levels, visible=visible)
    if white_is_zero:
        grey = 255 - grey
    if visible is not None:
        grey = np.where(visible, grey, np.uint8(0))
    return Image.fromarray(grey).convert("RGB")


def _deep_colour_to_rgb(
    image: Image.Image, path: str | os.PathLike[str], *, turned: bool
) -> Image.Image:
    """RGB of a 16 bit colour file, of which Pillow gives the high bytes."""
    has_tag = "transparency" in image.info
    high_bytes = image.convert("RGBA") if image.mode in ("RGBA", "LA") else image.convert("RGB")
    extrema = high_bytes.getextrema()
    low, high = min(pair[0] for pair in extrema[:3]), max(pair[1] for pair in extrema[:3])  # type: ignore[index,type-var]
    see_through = has_tag or (len(extrema) == 4 and extrema[3] != (255, 255))
    if high - low >= _HALF_OF_16_BITS >> 8 and not has_tag:  # type: ignore[operator]
        return _over_black(high_bytes)
    if see_through or turned:
        raise ImageError(
            f"image {str(path)!r} is 16 bit colour with transparency or an EXIF rotation",
            remedy="Save it upright as 8 bit RGB.",
            reason="unsupported_image",
        )
    import cv2

    data = np.fromfile(path, dtype=np.uint8)
    levels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if levels is None or levels.dtype != np.uint16 or levels.shape[:2] != image.size[::-1]:
        raise ImageError(
            f"image {str(path)!r} is 16 bit colour of a kind that can't be decoded",
            remedy="Save it as 8 bit RGB.",
            reason="unsupported_image",
        )
    return Image.fromarray(_scale_to_8_bits(np.ascontiguousarray(levels[:, :, 2::-1])))


def _scale_to_8_bits(levels: np.ndarray, *, visible: np.ndarray | None = None) -> np.ndarray:
    """Deep levels -> uint8 of the same shape; the rule is in the module's docstring.

    Args:
        levels: unsigned 16 bit, signed 32 bit or finite float.
        visible: mask of the pixels that count for the window; default all.
    """
    shown = levels if visible is None or not visible.any() else levels[visible]
    low, high = shown.min().item(), shown.max().item()
    is_16_bit = levels.dtype.kind != "f" and low >= 0 and high <= 65535
    if is_16_bit and (high == low or high - low >= _HALF_OF_16_BITS):
        return (levels.clip(0, 65535) >> 8).astype(np.uint8)
    if high == low:
        return np.zeros(levels.shape, dtype=np.uint8)
    if is_16_bit:
        table = np.arange(65536, dtype=np.float64)
        table = np.rint((table - low) * (255.0 / (high - low))).clip(0, 255).astype(np.uint8)
        return table[levels.clip(0, 65535)]
    scaled = (levels.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)

# SPDX-License-Identifier: Apache-2.0

"""An image of a source -> an image file of the corpus, named by its pixels.

How a file is decoded is written in `gmai_xtuner.core.imaging.images`: the trainer decodes by the same rules,
so the corpus shows what the model sees. A PNG or JPEG that every viewer shows alike (8-bit grey or colour,
upright, opaque, one frame) is kept. Everything that doesn't make the image is taken out of it, which may say
who the patient is; the coded pixels stay byte for byte. Everything else becomes a PNG of 8-bit grey or RGB.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.errors import ImageError, Unusable
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.imaging.images import MAX_PIXELS, DecodedPixels, decode_pixels
from gmai_xtuner.core.imaging.windows import to_8_bits

MAX_BYTES = 4 * 2**30

CANT_READ = "image can't be read"
TRUNCATED = "image is truncated"
TOO_LARGE = "image is too large"
UNSUPPORTED = "image is of an unsupported kind"
ONE_LEVEL = "picture of one grey level"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of the corpus, upright.

    ``path`` below the folder, ``ab/abcdef....png``, is the hash of the pixels and, of a file kept, of its
    bytes; ``pixels`` the first of these. ``turned``: EXIF orientation was applied, so that coordinates of the
    file don't fit.
    """

    path: str
    pixels: str
    width: int
    height: int
    turned: bool = False


def store_image(image: Path | np.ndarray, folder: Path) -> StoredImage:
    """Put an image file, or an array of it, into a folder under the hash of its pixels, unless it is there.

    A reader never sees a part of the file, so several processes may store the same image at once. `Unusable`
    with one of the module's reasons.
    """
    data: bytes | None = None
    if isinstance(image, np.ndarray):
        decoded = DecodedPixels(_from_array(image), False, "")
    else:
        content = _read_file(image)
        decoded = _decoded(content, image.name)
        if decoded.suffix:
            strip = _png_without_text if decoded.suffix == ".png" else _jpeg_without_text
            data = strip(content)
    pixels = decoded.pixels
    first = pixels[:1, :1]
    if pixels[0, 0].tobytes() == pixels[-1, -1].tobytes() and (pixels == first).all():
        raise Unusable(ONE_LEVEL, f"every pixel is {first.ravel().tolist()}")
    height, width = pixels.shape[:2]
    name = pixel_hash(pixels)
    # Two files of the same pixels may differ in their bytes: which of them is kept must not be a race.
    bytes_hash = f"-{hashlib.blake2b(data, digest_size=4).hexdigest()}" if data else ""
    path = f"{name[:2]}/{name}{bytes_hash}{decoded.suffix if data else '.png'}"
    target = folder / path
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, data or _png(pixels), durable=False)
    return StoredImage(path, name, width, height, decoded.turned)


def read_pixels(image: Path | bytes) -> DecodedPixels:
    """Return pixels as the corpus shows them, also of one grey level, and whether EXIF has turned them."""
    if isinstance(image, bytes):
        return _decoded(image, "")
    return _decoded(_read_file(image), image.name)


def pixel_hash(pixels: np.ndarray) -> str:
    """Return 32 hexadecimal digits that stand for uint8 ``[H, W]`` or ``[H, W, 3]``, shape included."""
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    digest.update(f"{width}x{height}x{1 if pixels.ndim == 2 else 3}".encode())
    return digest.hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        if not path.exists() and (found := locate(path)):
            return found[0].content(found[1], path.name)
        if (size := path.stat().st_size) <= MAX_BYTES:
            return path.read_bytes()
    except ImageError as error:
        raise unusable(error, path.name) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unusable(CANT_READ, f"{type(error).__name__}: {error}"[:200]) from error
    raise Unusable(TOO_LARGE, f"{size} bytes")


def _decoded(content: bytes, name: str) -> DecodedPixels:
    try:
        return decode_pixels(content, name)
    except ImageError as error:
        raise unusable(error, name) from error


def unusable(error: ImageError, name: str | Path) -> Unusable:
    """Return what is wrong with an image in the words of the corpus."""
    detail = error.problem.removeprefix(f"image {str(name)!r} ")
    detail += "; read it with `reader: arrays`" if "TIFF stack" in detail else ""
    if error.reason == "enormous_image":
        reason = TOO_LARGE
    elif error.reason == "unsupported_image" and "none of the formats" not in detail:
        reason = UNSUPPORTED
    elif any(word in detail.lower() for word in ("truncated", "unexpected end", "eof", "empty")):
        reason = TRUNCATED
    else:
        reason = CANT_READ
    return Unusable(reason, detail)


def _from_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
        raise Unusable(CANT_READ, f"an array of shape {pixels.shape}")
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
        raise Unusable(TOO_LARGE, f"{size}, the limit is {MAX_PIXELS} in all")
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype != np.uint8:
        try:
            pixels = to_8_bits(pixels)
        except ValueError as error:
            raise Unusable(UNSUPPORTED, str(error)) from error
    return np.ascontiguousarray(pixels)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 3 writes twice as fast as the default and 5 % larger.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


_PNG_CHUNKS: dict[bytes, int | None] = {b"IHDR": 13, b"IDAT": None, b"IEND": 0}
_PNG_CHUNKS |= {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
"""Chunks that make an image of grey or RGB, and the length that they have."""


def _png_without_text(data: bytes) -> bytes | None:
    """Return the file with the chunks that make the image; None if it can't be followed."""
    parts, at, pixels = [data[:8]], 8, b""
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            return None
        if kind in _PNG_CHUNKS and _PNG_CHUNKS[kind] in (length, None):
            parts.append(data[at:end])
            pixels += data[at + 8 : end - 4] if kind == b"IDAT" else b""
        at = end
        if kind == b"IEND":
            return b"".join(parts) if _is_pixels_alone(parts[1], pixels) else None
    return None


def _is_pixels_alone(header: bytes, packed: bytes) -> bool:
    """Tell whether the compressed data of an 8-bit PNG hold its rows and nothing behind them."""
    width, height, depth, colours, *_, interlaced = struct.unpack(">IIBBBBB", header[8:21])
    channels = {0: 1, 2: 3}.get(colours, 0)
    size = height * (1 + width * channels)
    unpack = zlib.decompressobj()
    try:
        unpacked = len(unpack.decompress(packed, size + 1))
    except zlib.error:
        return False
    whole = unpack.eof and not unpack.unused_data and unpacked == size
    return whole and depth == 8 and channels > 0 and not interlaced


_JPEG_SEGMENTS = (*range(0xC0, 0xD0), *range(0xDA, 0xDE))
"""Frames, tables and scans: what makes the image."""
_JPEG_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_JPEG_NEXT = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""The end of a scan: no stuffed byte and no restart mark."""


def _jpeg_without_text(data: bytes) -> bytes | None:
    """Return the first image of the file: frames, tables, scans, the numbers of JFIF and Adobe's transform.

    Comments, application data (EXIF, ICC profiles, thumbnails) and what follows the end mark are left out.
    None if the segments can't be followed.
    """
    parts, at = [data[:2]], 2
    while found := _JPEG_MARKER.match(data, at):
        marker, start = found[1][0], found.end()
        if marker == 0xD9:
            return b"".join([*parts, b"\xff\xd9"])
        end = start + int.from_bytes(data[start : start + 2], "big")
        if end < start + 2 or end > len(data):
            return None
        body = data[start + 2 : end]
        if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            parts.append(b"\xff\xe0\0\x10" + body[:12] + b"\0\0")  # without its thumbnail
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            parts.append(b"\xff\xee\0\x0e" + body[:12])
        elif marker in _JPEG_SEGMENTS:
            after = end
            if marker == 0xDA:
                behind = _JPEG_NEXT.search(data, end)
                if behind is None:
                    return None
                after = behind.start()
            parts.append(data[found.start() : after])
            end = after
        at = end
    return None

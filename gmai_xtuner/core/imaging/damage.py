# SPDX-License-Identifier: Apache-2.0

"""Damage inside image files that decoders pass over, and so show as grey or shifted blocks.

* **JPEG**: what libjpeg-turbo warns of; Pillow does not ask for its warnings. Coded pixels have no checksum,
  so a changed bit that gives another valid image can't be found.
* **PNG**: the checksum (CRC-32) of each chunk, of which Pillow skips that of the pixels.
* **TIFF**: the checksum (Adler-32) of each strip or tile that is compressed by Deflate, and the warnings of
  each that is a JPEG. Strips of other kinds have none.

GIF, BMP and WebP have no checksums.

The share of planted damage that is found, by format: ``benchmarks/damage.py`` and docs/reliability.md.
"""

from __future__ import annotations

import zlib
from typing import Any

from PIL import Image

_DEFLATE = (8, 32946)
_JPEG_IN_TIFF = 7
_AT_ONCE = 2**20
_MAX_STRIP = 2**31


def find_damage(content: bytes, image: Image.Image) -> str:
    """Return what decoding an opened file leaves unsaid of its whole ``content``; empty if nothing."""
    if image.format in ("JPEG", "MPO"):
        return _jpeg(content)
    if image.format == "PNG":
        return _png(content)
    return _tiff(content, image) if image.format == "TIFF" else ""


def _jpeg(content: bytes) -> str:
    import simplejpeg

    try:
        # At an eighth of the size: all coded data is read, most of the arithmetic is left out.
        simplejpeg.decode_jpeg(content, colorspace="GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        return str(error)
    return ""


def _png(content: bytes) -> str:
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        if end > len(content):
            return f"the file ends within the chunk at byte {at}"
        # memoryview: the pixels are often one chunk, as large as the file
        checksum = zlib.crc32(memoryview(content)[at + 4 : end - 4])
        if checksum != int.from_bytes(content[end - 4 : end], "big"):
            return f"the checksum of the chunk at byte {at} is wrong"
        at = end
    return ""


def _tiff(content: bytes, image: Any) -> str:
    tags = image.tag_v2
    compression, tables = tags.get(259, 1), tags.get(347, b"")
    offsets = tags.get(273) or tags.get(324) or ()
    counts = tags.get(279) or tags.get(325) or ()
    if compression not in (*_DEFLATE, _JPEG_IN_TIFF):
        return ""
    for number, (offset, count) in enumerate(zip(offsets, counts, strict=False), 1):
        strip = content[offset : offset + count]
        whole = tables[:-2] + strip[2:] if tables else strip
        if problem := _deflated(strip) if compression in _DEFLATE else _jpeg(whole):
            return f"strip or tile {number}: {problem}"
    return ""


def _deflated(strip: bytes) -> str:
    unpacking, rest, size = zlib.decompressobj(), strip, 0
    try:
        while rest and not unpacking.eof and size <= _MAX_STRIP:
            size += len(unpacking.decompress(rest, _AT_ONCE))
            rest = unpacking.unconsumed_tail
    except zlib.error as error:
        return str(error)
    return "" if unpacking.eof else "the compressed data does not end"

# SPDX-License-Identifier: Apache-2.0

"""Planted damage in image files -> the share that is found, by format: by decoding alone, and by check_image.

``decode`` is ``open_rgb``, as training reads; ``careful`` is ``check_image(level="decode")``, as the corpus
builder, ``check_images="decode"`` and the preflight look. Images are drawn: shading, edges and grain.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from images import draw
from printing import parser, quiet_stdout, show

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import check_image, open_rgb

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("jpg", {"quality": 90}),
    "JPEG, progressive": ("jpg", {"quality": 90, "progressive": True}),
    "PNG": ("png", {}),
    "TIFF, Deflate": ("tif", {"compression": "tiff_deflate"}),
    "TIFF, JPEG": ("tif", {"compression": "jpeg"}),
    "TIFF, LZW": ("tif", {"compression": "tiff_lzw"}),
    "TIFF, plain": ("tif", {}),
    "WebP, lossless": ("webp", {"lossless": True}),
    "WebP": ("webp", {"quality": 90}),
    "JPEG 2000": ("jp2", {}),
    "GIF": ("gif", {}),
    "BMP": ("bmp", {}),
}
DAMAGES = (
    "cut at the end",
    "2,000 bytes zeroed",
    "2,000 bytes removed",
    "20 bits flipped",
    "1 bit flipped",
)
BEHIND_HEADERS = 1_000
"""Bytes at the start that stay as they are: damage there is found by every reader."""


def damaged(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Return a copy of a file with one damage inside."""
    at = int(rng.integers(BEHIND_HEADERS, max(BEHIND_HEADERS + 1, len(content) - 2_500)))
    if kind == "cut at the end":
        return content[:at]
    if kind == "2,000 bytes zeroed":
        return content[:at] + bytes(2_000) + content[at + 2_000 :]
    if kind == "2,000 bytes removed":
        return content[:at] + content[at + 2_000 :]
    changed = bytearray(content)
    for place in rng.integers(BEHIND_HEADERS, len(content) - 2, 20 if kind.startswith("20") else 1):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def planted(args: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each format and damage."""
    rng = np.random.default_rng(args.seed)
    file = folder / "image"
    for name, (suffix, options) in KINDS.items():
        whole = []
        for _ in range(args.pictures):
            path = folder / f"whole.{suffix}"
            draw(args.side, args.side, "RGB", rng).save(path, **options)
            check_image(path, level="decode")  # nothing is found in a whole file
            whole.append(path.read_bytes())
        for kind in DAMAGES:
            found = {"decode": 0, "careful": 0}
            for number in range(args.tries):
                file.write_bytes(damaged(whole[number % len(whole)], kind, rng))
                found["decode"] += _refuses(lambda: open_rgb(file))
                found["careful"] += _refuses(lambda: check_image(file, level="decode"))
            shares = {way: count / args.tries for way, count in found.items()}
            yield {"format": name, "damage": kind, **shares}


def _refuses(read: Callable[[], Any]) -> bool:
    try:
        read()
    except ImageError:
        return True
    return False


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tries", type=int, default=100, help="of each format and damage")
    options.add_argument("--pictures", type=int, default=5, help="of each format")
    options.add_argument("--side", type=int, default=400, help="of a picture, in pixels")
    args = options.parse_args()
    with quiet_stdout(), tempfile.TemporaryDirectory() as folder:
        rows = list(planted(args, Path(folder)))
    show({"tries": args.tries, "rows": rows}, as_json=args.json)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0

"""Text of ten sizes drawn into images -> the share that ``text_in_pixels`` finds, and its false alarms.

Images are the public ones that come with scikit-image, and every image below ``--images DIR``; without text
each is asked first: what is found there is a false alarm (look: a scanner's own marks are none). Names,
dates and numbers as scanners write them, white or black, whichever the ground is not, at a random place.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from printing import parser, quiet_stdout, show

from data_tools.preprocess.burned_in import find_text
from data_tools.preprocess.images import read_pixels
from gmai_xtuner.core.errors import Unusable

SIZES = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48)
"""Pixels from the top of a letter's body to its foot, as fonts count."""
FONT = Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
PACKAGED = ("retina", "immunohistochemistry", "camera", "cell", "microaneurysms", "human_mitosis")


def images(folder: Path | None, at_most: int) -> dict[str, np.ndarray]:
    """Return RGB images by name, at most so many of a folder, spread over it."""
    from skimage import data

    found = {}
    for name in PACKAGED:
        try:
            found[name] = getattr(data, name)()
        except (ModuleNotFoundError, OSError):  # not in the wheel
            continue
    below = sorted(folder.rglob("*")) if folder else []
    files = [path for path in below if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    for path in files[:: max(1, len(files) // at_most)] if files else []:
        try:
            found[path.name] = read_pixels(path).pixels
        except Unusable:
            continue
    return {
        name: np.asarray(Image.fromarray(pixels).convert("RGB")) for name, pixels in found.items()
    }


def text_of(rng: random.Random) -> str:
    """Return a name, a date or a number of nobody."""
    name = "".join(rng.choice("BCDFGHKLMNPRSTVW") + rng.choice("aeiou") for _ in range(3)).title()
    date = f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}.{rng.randint(1930, 2024)}"
    return rng.choice(
        (f"{name}^{name[::-1].title()}", f"{name} {date}", f"ID {rng.randrange(10**7)}")
    )


def drawn(
    image: np.ndarray, size: int, rng: random.Random
) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """Return the image with a text, and the text's box; None if it has no room for it."""
    made, font, text = Image.fromarray(image), ImageFont.truetype(str(FONT), size), text_of(rng)
    draw = ImageDraw.Draw(made)
    left, top, right, bottom = (int(edge) for edge in draw.textbbox((0, 0), text, font=font))
    if right + 8 > made.width or bottom + 8 > made.height:
        return None
    x, y = (
        rng.randint(4 - left, made.width - right - 4),
        rng.randint(4 - top, made.height - bottom - 4),
    )
    box = (x + left, y + top, x + right, y + bottom)
    ground = image[box[1] : box[3], box[0] : box[2]].mean()
    draw.text((x, y), text, font=font, fill=(255,) * 3 if ground < 128 else (0,) * 3)
    return np.asarray(made), box


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=Path, help="folder of further images without any text")
    arguments.add_argument("--at-most", type=int, default=12, help="images of that folder")
    arguments.add_argument("--tries", type=int, default=1, help="texts of each size in each image")
    options = arguments.parse_args()
    rng = random.Random(0)
    with quiet_stdout():
        tried, hit, false = Counter[int](), Counter[int](), {}
        chosen = images(options.images, options.at_most)
        for name, image in chosen.items():
            if known := find_text(image):
                false[name] = len(known)
            for size in SIZES * options.tries:
                if (made := drawn(image, size, rng)) is not None:
                    pixels, (x1, y1, x2, y2) = made
                    tried[size] += 1
                    hit[size] += any(
                        a < x2 and b < y2 and c > x1 and d > y1 for a, b, c, d in find_text(pixels)
                    )
    result: dict[str, Any] = {
        "images": len(chosen),
        "texts": tried.total(),
        "recall": round(hit.total() / tried.total(), 4),
        "recall_by_size": {size: f"{hit[size]} of {tried[size]}" for size in SIZES},
        "false_alarms": false,
        "false_alarm_rate": round(len(false) / len(chosen), 4),
    }
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()

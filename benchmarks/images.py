# SPDX-License-Identifier: Apache-2.0

"""Image file -> pixel values of CLIP ViT-L/14-336, against xtuner's LLaVADataset, bit for bit.

Images are drawn: shading, edges in all directions and grain. One core. Of each image the best of
several readings counts, ours and xtuner's by turns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from printing import parser, quiet_stdout, show

SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
KINDS = {
    # name: (width, height, suffix, options of Pillow's save)
    "512x512 PNG": (512, 512, ".png", {}),
    "512x512 JPEG": (512, 512, ".jpg", {"quality": 90}),
    "1024x1024 JPEG": (1024, 1024, ".jpg", {"quality": 90}),
    "2048x2500 JPEG": (2048, 2500, ".jpg", {"quality": 90}),
    "4032x3024 JPEG": (4032, 3024, ".jpg", {"quality": 90}),
    "1024x768 grey PNG": (1024, 768, ".png", {"mode": "L"}),
    "1500x1800 16-bit PNG": (1500, 1800, ".png", {"mode": "I;16"}),
}
CLIPPED_BY_XTUNER = ("1500x1800 16-bit PNG",)
"""``convert("RGB")`` clips 16 bit to 8: the pictures can't and shall not be the same."""


def draw(width: int, height: int, mode: str, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre, period = rng.uniform(0.3, 0.7, 2), rng.uniform(20, 80)
    rings = np.hypot(x - centre[0] * width, y - centre[1] * height) // period % 2
    grain = rng.normal(0, 4, (height, width)).astype(np.float32)
    grey = 50 + 70 * rings + 60 * x / width + 30 * np.sin(y / period) + grain
    if mode == "L":
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((grey * 16).clip(0, 4095).astype(np.uint16))  # 12 bit, as CT and CR
    colour = np.stack([grey, 0.9 * grey + 10, 255 - grey], axis=-1)
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, each: int, seed: int) -> dict[str, list[Path]]:
    """Written once, kept for the next run."""
    files: dict[str, list[Path]] = {}
    for number, (kind, (width, height, suffix, options)) in enumerate(KINDS.items()):
        options = dict(options)
        mode = options.pop("mode", "RGB")
        for index in range(each):
            file = folder / f"{number}-{index}-{seed}{suffix}"
            if not file.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([seed, number, index])
                draw(width, height, mode, rng).save(file, **options)
            files.setdefault(kind, []).append(file)
    return files


def xtuner_reader() -> Callable[[Path], Any]:
    """The image path of xtuner's own ``LLaVADataset.__getitem__``."""
    from transformers import CLIPImageProcessor
    from xtuner.dataset import LLaVADataset

    dataset = object.__new__(LLaVADataset)  # without a corpus of text
    dataset.image_folder = ""
    dataset.pad_image_to_square = True
    dataset.image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )

    def read(path: Path) -> Any:
        dataset.text_data = [{"image": str(path)}]
        return dataset[0]["pixel_values"]

    return read


def decode(path: Path) -> None:
    """What no reader can spare that uses Pillow's decoders: open, decode, RGB."""
    with Image.open(path) as image:
        image.convert("RGB")


def best_times(
    readers: dict[str, Callable[[Path], Any]], path: Path, seconds: float
) -> dict[str, float]:
    """Milliseconds of each reader, by turns, at least three readings and until the time is up."""
    best = dict.fromkeys(readers, float("inf"))
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        for name, reader in readers.items():
            started = time.perf_counter()
            reader(path)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
        rounds += 1
    return best


def measure(kind: str, files: list[Path], seconds: float) -> dict[str, Any]:
    """One row of the table: mean milliseconds of an image."""
    import torch

    from gmai_xtuner.data.images import ImageTransform

    full = ImageTransform(SIZE, MEAN, STD)
    scaled = ImageTransform(SIZE, MEAN, STD, decoding="scaled")
    readers: dict[str, Callable[[Path], Any]] = {
        "ours": full.read,
        "xtuner": xtuner_reader(),
        "decode": decode,
        "scaled": scaled.read,
    }
    times = [best_times(readers, file, seconds / len(files)) for file in files]
    mean = {name: sum(best[name] for best in times) / len(times) for name in readers}
    same, value_gaps, level_gaps = [], [], []
    spread = 255 * torch.tensor(STD)[:, None, None]
    for file in files:
        ours = full.read(file)
        same.append(torch.equal(ours, readers["xtuner"](file)))
        gap = (ours - scaled.read(file)).abs()
        value_gaps.append(gap)
        level_gaps.append(gap * spread)
    values, levels = torch.stack(value_gaps), torch.stack(level_gaps)
    return {
        "kind": kind,
        "files": len(files),
        "identical": all(same),
        "different": same.count(False),
        "ours_ms": mean["ours"],
        "xtuner_ms": mean["xtuner"],
        "ratio": mean["xtuner"] / mean["ours"],
        "decode_share": mean["decode"] / mean["ours"],
        "scaled_ms": mean["scaled"],
        "scaled_ratio": mean["xtuner"] / mean["scaled"],
        "scaled_max_levels": float(levels.max()),
        "scaled_mean_levels": float(levels.mean()),
        "scaled_max_value": float(values.max()),
        "scaled_mean_value": float(values.mean()),
    }


def readable(files: list[Path]) -> list[Path]:
    """Those that both sides can read; the others are told on stderr."""
    from gmai_xtuner.core.errors import ImageError
    from gmai_xtuner.data.images import ImageTransform

    ours, theirs = ImageTransform(SIZE, MEAN, STD), xtuner_reader()
    kept = []
    for file in files:
        try:
            ours.read(file)
            theirs(file)
        except (ImageError, OSError, ValueError) as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            kept.append(file)
    return kept


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=4, help="pictures of each kind")
    options.add_argument("--seconds", type=float, default=4.0, help="for each kind")
    options.add_argument("--images", type=Path, help="also measure the images below this folder")
    arguments = options.parse_args()
    with quiet_stdout():
        import torch

        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        files = write_pictures(arguments.work_dir / "images", arguments.samples, arguments.seed)
        if arguments.images:
            suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
            found = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in suffixes)
            order = np.random.default_rng(arguments.seed).permutation(len(found))
            chosen = readable([found[i] for i in order[: 8 * arguments.samples]])
            if not chosen:
                raise SystemExit(f"no image that both sides can read below {arguments.images}")
            files["real images"] = chosen
        kinds = [measure(kind, paths, arguments.seconds) for kind, paths in files.items()]
        compared = [row for row in kinds if row["kind"] in KINDS]
        compared = [row for row in compared if row["kind"] not in CLIPPED_BY_XTUNER]
        different = [row["kind"] for row in compared if not row["identical"]]
        if different:
            raise AssertionError(f"not bit for bit xtuner's: {different}")
        result = {
            "samples": sum(row["files"] for row in kinds),
            "identical": not different,
            # Kinds count alike: the geometric mean does not depend on how slow a kind is.
            "ratio": float(np.exp(np.mean([np.log(row["ratio"]) for row in compared]))),
            "lowest_ratio": min(row["ratio"] for row in compared),
            "scaled_max_levels": max(row["scaled_max_levels"] for row in kinds),
            "kinds": kinds,
        }
    show(result, as_json=arguments.json)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0

"""Images a second out of loose files and containers, through this project's opener and its peers.

Each reader gets the same images in the same order, which is that of the records or shuffled. ``read`` takes
the bytes, ``decode`` makes RGB pixels of them by the same function. All are in the page cache. `webdataset`
and `datasets` read as their pages say: a stream of shards, and a memory-mapped table, here without a copy.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from printing import parser, quiet_stdout, show

from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.imaging.images import decode_rgb

Reader = Callable[[Sequence[str]], Iterator[bytes]]
GROUP = 100
"""Rows of a row group, as `datasets` writes images."""


def make(folder: Path, *, images: int, side: int, seed: int) -> list[str]:
    """Write the same images as loose files, zip, tar, Parquet and Arrow; return their names."""
    names = [f"{number:06}.jpg" for number in range(images)]
    made = folder / f"{images}-{side}-{seed}.json"
    if made.is_file():
        return names
    draw = np.random.default_rng(seed)
    noise = draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    (folder / "loose").mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        zipfile.ZipFile(folder / "images.zip", "w") as packed,
        tarfile.open(folder / "images.tar", "w") as tar,
    ):
        for name in names:
            shown = Image.fromarray(np.roll(noise, draw.integers(0, side), axis=(0, 1)))
            buffer = io.BytesIO()
            shown.resize((side, side)).save(buffer, "JPEG", quality=90)
            content = buffer.getvalue()
            (folder / "loose" / name).write_bytes(content)
            packed.writestr(name, content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            rows.append({"bytes": content, "path": name})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(rows, kind)})
    pq.write_table(table, folder / "images.parquet", row_group_size=GROUP)
    with pa.ipc.new_stream(str(folder / "images.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=GROUP)
    made.write_text(json.dumps(len(names)))
    return names


def own(root: Path) -> Reader:
    """Return the reader of a folder or container by this project."""

    def read(names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            if (found := locate(root / name)) is None:
                yield (root / name).read_bytes()
            else:
                yield found[0].content(found[1], name)

    return read


def loose(root: Path) -> Reader:
    """Return the reader of loose files by Python alone."""
    return lambda names: ((root / name).read_bytes() for name in names)


def peers(folder: Path) -> dict[str, Reader | str]:
    """Return the readers of peers, or why one can't run."""
    found: dict[str, Reader | str] = {}
    try:
        import webdataset

        def stream(names: Sequence[str]) -> Iterator[bytes]:
            shards = webdataset.WebDataset(str(folder / "images.tar"), shardshuffle=False)
            yield from (sample["jpg"] for sample in shards)

        found[f"webdataset {version('webdataset')}: tar, in its order"] = stream
    except ImportError as error:
        found["webdataset: tar"] = f"not installed ({error})"
    try:
        import datasets

        rows = datasets.Dataset.from_file(str(folder / "images.arrow"))
        place = {name: row for row, name in enumerate(image["path"] for image in rows["image"])}

        def mapped(names: Sequence[str]) -> Iterator[bytes]:
            yield from (rows[place[name]]["image"]["bytes"] for name in names)

        found[f"datasets {version('datasets')}: Arrow"] = mapped
    except ImportError as error:
        found["datasets: Arrow"] = f"not installed ({error})"
    return found


def rate(read: Reader, names: Sequence[str], *, decode: bool) -> float:
    """Return images a second."""
    started = time.perf_counter()
    count = 0
    for content in read(names):
        count += 1
        if decode:
            decode_rgb(content, "image")
    assert count == len(names), f"{count} images came of {len(names)}"
    return count / (time.perf_counter() - started)


def main() -> None:
    """Print a row a container: images a second, and the share of loose files' speed."""
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=2_000)
    made.add_argument("--side", type=int, default=512, help="pixels")
    made.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    options = made.parse_args()
    folder = options.work_dir / "containers"
    with quiet_stdout():
        names = make(folder, images=options.images, side=options.side, seed=options.seed)
        shuffled = random.Random(options.seed).sample(names, len(names))
        readers: dict[str, Reader | str] = {"loose files": loose(folder / "loose")}
        for suffix in ("zip", "tar", "arrow", "parquet"):
            readers[suffix] = own(folder / f"images.{suffix}")
        readers |= peers(folder)
        rows: dict[str, Any] = {name: {} for name in readers}
        ways = {"decode": (names, True), "read": (names, False), "read_shuffled": (shuffled, False)}
        for way, (order, decode) in ways.items():
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(options.rounds):  # in turn, so that a slow minute slows all of them
                for name, read in readers.items():
                    random_parquet = name == "parquet" and way == "read_shuffled"
                    some = order[:GROUP] if random_parquet else order
                    if not isinstance(read, str):
                        rates[name].append(rate(read, some, decode=decode))
            for name, values in rates.items():
                if values:
                    rows[name][f"{way}_per_second"] = round(statistics.median(values), 1)
                    pairs = zip(values, rates["loose files"], strict=True)
                    share = statistics.median(one / other for one, other in pairs)
                    rows[name][f"{way}_of_loose"] = round(share, 3)
                else:
                    rows[name]["skipped"] = readers[name]
    show({"images": len(names), "side": options.side, "containers": rows}, as_json=options.json)


if __name__ == "__main__":
    main()

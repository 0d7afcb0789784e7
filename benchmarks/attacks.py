# SPDX-License-Identifier: Apache-2.0

"""Files and requests that cost far more than they weigh -> what comes of each, in seconds and memory.

Each is opened in a process of its own, by the code that training, corpus builder, page and server use; what
counts is opening alone, without making the file. docs/reliability.md has the figures before and after.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from printing import parser, peak_gib, show

MIB = 2**20
HEAD = b'{"model": "m", "messages": '
USER = b'[{"role": "user", "content": '


def png(width: int, height: int) -> bytes:
    """A PNG of black pixels, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packing = zlib.compressobj(9)
    body = b"".join(packing.compress(bytes(1 + width)) for _ in range(height)) + packing.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def tiff_pages(count: int) -> bytes:
    """A TIFF whose pages differ in size, so that none ends the search for a stack."""
    parts, at = [b"II*\0" + struct.pack("<I", 8)], 8
    for number in range(count):
        fields = (
            (256, 2 + number % 2 if number else 30),
            (257, 1),
            (258, 8),
            (259, 1),
            (262, 1),
            (273, 0),
            (279, 2),
        )
        size = 2 + 12 * len(fields) + 4
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
        following = at + size if number + 1 < count else 0
        parts.append(struct.pack("<H", len(fields)) + entries + struct.pack("<I", following))
        at += size
    return b"".join(parts)


def jpeg_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4000, 4000), "white").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def parquet() -> bytes:
    """A hundred million turns, all of them the same."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000_000, np.int8)), ["x"])
    schema = pa.schema([("conversations", many.type)])
    out = io.BytesIO()
    with pq.ParquetWriter(out, schema) as writer:
        writer.write_table(pa.table([many], schema=schema), row_group_size=100_000_000)
    return out.getvalue()


def open_image(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.imaging.images import open_rgb
    from gmai_xtuner.data.images import ImageTransform

    (folder / "a").write_bytes(content)
    ImageTransform(336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(open_rgb(folder / "a"))


def open_request(content: bytes, folder: Path) -> None:
    from gmai_xtuner.serve.protocol import read_request

    read_request(content).sampling()


def open_yaml(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.yaml_lines import Document

    (folder / "a.yaml").write_bytes(content)
    Document(folder / "a.yaml", what="job file")


def open_records(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.conversation import parse_raw
    from gmai_xtuner.core.records import iter_raw

    file = folder / ("a.parquet" if content.startswith(b"PAR1") else "a.jsonl")
    file.write_bytes(content)
    for raw in iter_raw(file):
        parse_raw(raw, dataset="d")


Open = Callable[[bytes, Path], None]
ATTACKS: dict[str, tuple[Open, Callable[[], bytes]]] = {
    "PNG of 10 x 100,000": (open_image, lambda: png(10, 100_000)),
    "PNG of 1 x 60,000": (open_image, lambda: png(1, 60_000)),
    "PNG of 1 x 100,000,000": (open_image, lambda: png(100_000_000, 1)),
    "PNG of 100 x 60,000 (honest)": (open_image, lambda: png(100, 60_000)),
    "TIFF of 40,000 pages": (open_image, lambda: tiff_pages(40_000)),
    "JPEG of 1,000 scans": (open_image, lambda: jpeg_scans(1_000)),
    "15 MiB of wrong items": (open_request, lambda: HEAD + b"[" + b"1," * (15 * MIB // 2) + b"1]}"),
    "15 MiB of wrong objects": (open_request, lambda: HEAD + b"[" + b"{}," * (5 * MIB) + b"{}]}"),
    "60 MiB of brackets": (open_request, lambda: HEAD + b"[" * (60 * MIB)),
    "60 MiB of parts": (
        open_request,
        lambda: HEAD + USER + b"[" + b'{"type":"text","text":""},' * (2 * MIB) + b"1]}]}",
    ),
    "60 MiB of stop texts": (
        open_request,
        lambda: HEAD + USER + b'"x"}], "stop": [' + b'"",' * (20 * MIB) + b'""]}',
    ),
    "repetition_penalty 1e-320": (
        open_request,
        lambda: HEAD + USER + b'"x"}], "repetition_penalty": 1e-320}',
    ),
    "YAML nested 100,000 deep": (open_yaml, lambda: b"a:\n" + b"- " * 100_000 + b"x"),
    "YAML of aliases of aliases": (
        open_yaml,
        lambda: b"".join(
            b"x%d: &x%d [%s]\n" % (i, i, b",".join([b"*x%d" % (i - 1)] * 10) if i else b"1")
            for i in range(12)
        ),
    ),
    "record with 5,000 digits": (open_records, lambda: b'{"id": ' + b"1" * 5_000 + b"}"),
    "record nested 100,000 deep": (open_records, lambda: b"[" * 100_000),
    "Parquet of 100,000,000 equal turns": (open_records, parquet),
}


def run_one(name: str) -> dict[str, Any]:
    """Open one attack in this process."""
    opening, make = ATTACKS[name]
    content = make()
    with tempfile.TemporaryDirectory() as folder:
        for warm_up in (png(2, 2), HEAD + USER + b'"x"}]}'):  # imports are no part of it
            try:
                opening(warm_up, Path(folder))
            except Exception:
                continue
        held, began = peak_gib(), time.perf_counter()
        try:
            opening(content, Path(folder))
            outcome = "opened"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}".replace(str(folder), "")[:90]
        seconds = time.perf_counter() - began
    size = f"{len(content):,}"
    return {
        "attack": name,
        "bytes": size,
        "seconds": seconds,
        "GiB": peak_gib() - held,
        "outcome": outcome,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=ATTACKS, help="one of them, in this process")
    args = options.parse_args()
    if args.only:
        print(json.dumps(run_one(args.only)))
        return
    rows = []
    for name in ATTACKS:
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ended = {
            "attack": name,
            "bytes": "",
            "seconds": 0.0,
            "GiB": 0.0,
            "outcome": f"died: {done.returncode}",
        }
        lines = done.stdout.splitlines()
        rows.append(json.loads(lines[-1]) if done.returncode == 0 and lines else ended)
    show({"attacks": len(rows), "rows": rows}, as_json=args.json)


if __name__ == "__main__":
    main()

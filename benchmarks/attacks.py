# SPDX-License-Identifier: Apache-2.0

"""Files and requests that cost far more than they weigh -> what comes of each, in seconds and memory.

Each is opened in a process of its own, by the code that training, corpus builder, page and server use; what
counts is opening alone, without making the file. docs/reliability.md has the figures before and after.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from printing import REPOSITORY, parser, peak_gib, show

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


Open = Callable[[bytes, Path], None]


def open_image(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.imaging.images import open_rgb
    from gmai_xtuner.data.images import ImageTransform

    (folder / "a").write_bytes(content)
    ImageTransform(336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(open_rgb(folder / "a"))


# --- volumes, DICOM, arrays ---------------------------------------------------------------------------


def nifti(*, offset: int = 352, side: int = 10, extensions: int = 0) -> bytes:
    """A NIfTI header of 352 bytes and what follows, all zeros."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype("float64")
    header.set_data_shape((side, side, side))
    header["vox_offset"], header["magic"], header["sform_code"] = offset, b"n+1", 1
    return bytes(header.binaryblock) + bytes(4 + extensions)


def coded_dicom(syntax: str, coded: bytes, *, side: int) -> bytes:
    """A DICOM file with one compressed frame, whatever it holds."""
    import numpy as np
    from pydicom.encaps import encapsulate

    from tests.medical_files import as_bytes, dicom

    data = dicom(np.zeros((2, 2), np.uint16))
    data.Rows = data.Columns = side
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([coded])
    data["PixelData"].is_undefined_length = True
    return as_bytes(data)


def jpeg2000(side: int) -> bytes:
    """A codestream of one tile that claims so many pixels and holds next to nothing."""
    siz = struct.pack(">HH8IH3B", 41, 0, side, side, 0, 0, side, side, 0, 0, 1, 7, 1, 1)
    cod = struct.pack(">HBBHBBBBBB", 12, 0, 0, 1, 0, 5, 4, 4, 0, 1)
    qcd = struct.pack(">HB16B", 19, 64, *[72] * 16)
    tile = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 0, 0, 1) + b"\xff\x93" + bytes(40)
    return b"\xff\x4f\xff\x51" + siz + b"\xff\x52" + cod + b"\xff\x5c" + qcd + tile + b"\xff\xd9"


def deflated() -> bytes:
    """A deflated DICOM of 4 GiB of zeros."""
    from tests.fuzz.targets import _dicoms

    packing = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = b"".join(packing.compress(bytes(2**24)) for _ in range(256)) + packing.flush()
    whole = _dicoms()["d.dcm"]
    (length,) = struct.unpack_from("<I", whole, 140)
    return whole[: 144 + length] + body


def jp2(side: int) -> bytes:
    """A JPEG 2000 of one colour, a hundred thousand times smaller than its pixels."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (side, side)).save(out, "JPEG2000")
    return out.getvalue()


def hdf5(*, chunk: int) -> bytes:
    """An HDF5 file whose one array is never written, in chunks of so many bytes."""
    import h5py

    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        shape = (4, chunk)
        file.create_dataset("imgs", shape, "u1", chunks=(1, chunk), compression="gzip")
    return out.getvalue()


def stack(count: int) -> bytes:
    """A TIFF stack of pages of 20,000 x 20,000 zeros that share one strip."""
    import numpy as np
    import tifffile

    out = io.BytesIO()
    page = np.zeros((20_000, 20_000), np.uint8)
    with tifffile.TiffWriter(out) as tiff:
        for _ in range(count):
            tiff.write(page, compression="zlib", photometric="minisblack", metadata=None)
    return out.getvalue()


def open_volume(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.imaging import volumes

    kinds = {b"NRRD": "a.nrrd", b"Obje": "a.mhd", b"\x1f\x8b\x08\x00": "a.nii.gz"}
    name = kinds.get(content[:4], "a.nii.gz" if content[:2] == b"\x1f\x8b" else "a.nii")
    (folder / name).write_bytes(content)
    volumes.load(folder / name, max_voxels=300_000_000)


def open_dicom(content: bytes, folder: Path) -> None:
    from gmai_xtuner.core.imaging import dicom, dicom_pixels

    (folder / "a.dcm").write_bytes(content)
    dicom_pixels.intensities(dicom.open_dataset(folder / "a.dcm"))


def open_unit(reader: str, name: str, **keys: Any) -> Open:
    """Return what reads the first unit of a source of one file, as the corpus builder does."""

    def open_it(content: bytes, folder: Path) -> None:
        import importlib

        from data_tools.standardise import read_unit
        from data_tools.taxonomy import load

        module = importlib.import_module(f"data_tools.readers.{reader}")
        (folder / "root" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "root" / "a" / name).write_bytes(content)
        source = module.Options(name="s", reader=reader, root=folder / "root", licence="MIT",
                                modality="CT", **keys)  # fmt: skip
        for unit in module.units(source):
            for drop in read_unit(source, unit, folder=folder / "out", taxonomy=load()).drops:
                raise ValueError(f"dropped: {drop.reason}: {drop.detail}")

    return open_it


def open_table(content: bytes, folder: Path) -> None:
    from data_tools.readers.rows import read_table

    (folder / "a.xlsx").write_bytes(content)
    list(read_table(folder / "a.xlsx", ["a"], source="s"))


def excel(kind: int) -> bytes:
    """An Excel file that unpacks to 4 GiB."""
    import zipfile

    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", kind) as archive,
        archive.open("x", "w", force_zip64=True) as file,
    ):
        for _ in range(256):
            file.write(bytes(2**24))
    return out.getvalue()


JPEG_LS = b"\xff\xd8\xff\xf7" + bytes(range(256))
RLE = b"\1\0\0\0\x40" + bytes(range(250))
NRRD = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/hostname\n\n"
META_IMAGE = b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"


def packed(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, 9)


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
    "JPEG 2000 of 13,000 x 13,000 (honest)": (open_image, lambda: jp2(13_000)),
    "DICOM, JPEG 2000 of 30,000 x 30,000": (
        open_dicom, lambda: coded_dicom("1.2.840.10008.1.2.4.90", jpeg2000(30_000), side=30_000)),
    "DICOM, JPEG 2000 of 13,000 x 13,000": (
        open_dicom, lambda: coded_dicom("1.2.840.10008.1.2.4.90", jpeg2000(13_000), side=13_000)),
    "DICOM, JPEG-LS of noise": (
        open_dicom, lambda: coded_dicom("1.2.840.10008.1.2.4.80", JPEG_LS, side=16)),
    "DICOM, RLE of noise": (
        open_dicom, lambda: coded_dicom("1.2.840.10008.1.2.5", RLE, side=16)),
    "DICOM, deflated 4 GiB": (open_dicom, deflated),
    "NIfTI of 352 bytes, 298 million voxels": (open_volume, lambda: nifti(side=668)),
    "NIfTI, 2 GiB of extensions in gzip": (
        open_volume, lambda: packed(nifti(offset=2**31 - 2**20, extensions=2**31 - 2**20 + 8000))),
    "NIfTI, voxels far away in gzip": (open_volume, lambda: packed(nifti(offset=2**30))),
    "NRRD that names /etc/hostname": (
        open_volume, lambda: NRRD),
    "MetaImage that names ../../x": (
        open_volume, lambda: META_IMAGE + b"ElementDataFile = ../../x\n"),
    "HDF5 with chunks of 4 GiB less one": (
        open_unit("arrays", "a.h5", images="{label}/{case}.h5"), lambda: hdf5(chunk=2**32 - 1)),
    "TIFF stack of 5 x 400 million pixels": (
        open_unit("arrays", "a.tif", images="{label}/{case}.tif"), lambda: stack(5)),
    "TIFF stack of 40,000 pages": (
        open_unit("arrays", "a.tif", images="{label}/{case}.tif"), lambda: tiff_pages(40_000)),
    "slide of noise": (open_unit("slide", "a.svs"), lambda: b"II*\0" + bytes(range(256)) * 40),
    "video of noise": (open_unit("video", "a.mp4"), lambda: b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40),
    "Excel of 4 GiB by deflate": (open_table, lambda: excel(8)),
    "Excel of 4 GiB by bzip2": (open_table, lambda: excel(12)),
}  # fmt: skip


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
        stop_workers()  # a new one begins, so that what it takes is of this attack
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
        "GiB": peak_gib() - held + worker_gib(),
        "outcome": outcome,
    }


def stop_workers() -> None:
    from gmai_xtuner.core.imaging import bounded

    bounded._stop_workers()


def worker_gib() -> float:
    """Return what the process of its own took, whether it lives or has died."""
    from gmai_xtuner.core.imaging import bounded

    if not bounded._idle:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    status = Path(f"/proc/{bounded._idle[-1]._process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=ATTACKS, help="one of them, in this process")
    args = options.parse_args()
    sys.path.insert(0, str(REPOSITORY))
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

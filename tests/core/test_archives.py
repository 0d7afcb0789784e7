# SPDX-License-Identifier: Apache-2.0

import base64
import io
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gmai_xtuner.core.archives import locate, open_archives
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import ArchiveError, DataError, ImageError
from gmai_xtuner.core.imaging.images import check_image, open_rgb
from gmai_xtuner.core.records import RawRecord, iter_raw


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_CACHE", str(tmp_path / "cache"))


def png(level: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def read_member(path: Path) -> bytes:
    index, name = locate(path)
    return index.content(name, str(path))


def pack(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def pack_rows(path: Path, members: list[tuple[str, bytes]], *, rows: int = 2) -> Path:
    """Write a column of images as `datasets` does: Parquet, or Arrow as a stream or a file."""
    images = pa.array([{"bytes": data, "path": name} for name, data in members], IMAGE)
    table = pa.table({"image": images, "id": list(map(str, range(len(images))))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        opener = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with opener(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=rows)
    return path


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
MEMBERS = [("a/1.png", png(1)), ("a/2.png", png(2)), ("ünï/3.png", png(3))]


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_path_leads_into_an_archive(tmp_path, suffix, method):
    archive = pack(tmp_path / f"scans{suffix}", MEMBERS, method)
    for name, content in MEMBERS:
        assert read_member(archive / name) == content
    for level in ("exists", "header", "decode"):
        check_image(archive / "a/1.png", level=level)
        with pytest.raises(ImageError) as missing:
            check_image(archive / "a/4.png", level=level)
        assert missing.value.reason == "missing_image"


@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow"])
def test_a_path_leads_into_a_column_of_images(tmp_path, name):
    path = pack_rows(tmp_path / name, MEMBERS)
    for member, content in MEMBERS:
        assert read_member(path / member) == content
    assert read_member(tmp_path / "*.*" / name / "a/2.png") == png(2)
    check_image(path / "a/1.png", level="decode")
    with pytest.raises(ImageError, match="no archive has such a member"):
        check_image(path / "a/4.png", level="exists")
    same = pack_rows(tmp_path / f"same-{name}", [("0.png", data) for _, data in MEMBERS])
    assert [read_member(same / str(row)) for row in range(3)] == [data for _, data in MEMBERS]


def test_the_name_is_in_one_of_several_shards(tmp_path):
    pack(tmp_path / "s-0.tar", [("./1.png", png(1)), ("same.png", png(2))])
    pack(tmp_path / "s-1.tar", [("3.png", png(3)), ("same.png", png(4))])
    root = tmp_path / "s-*.tar"
    assert read_member(root / "1.png") == png(1)
    assert read_member(root / "3.png") == png(3)
    with pytest.raises(ImageError, match=r"2 times: in '.*s-0\.tar' and '.*s-1\.tar'"):
        read_member(root / "same.png")
    assert read_member(root / "s-1.tar/same.png") == png(4)


def write_two_of_one_name(path):
    with pytest.warns(UserWarning, match="Duplicate") if path.suffix == ".zip" else nullcontext():
        pack(path, [("a.png", png(1)), ("a.png", png(1))])


def cut_to(length):
    def cut(path):
        path.write_bytes(pack(path, MEMBERS).read_bytes()[:length])

    return cut


def joined(path):
    whole = pack(path, MEMBERS).read_bytes()
    path.write_bytes(whole + pack(path, [("b.png", png(2))]).read_bytes())


def shared_bytes(path):
    whole = bytearray(pack(path, [("aa.png", png(1)), ("ab.png", png(1))]).read_bytes())
    second = whole.rindex(b"PK\1\2")
    whole[second + 42 : second + 46] = (0).to_bytes(4, "little")
    path.write_bytes(whole)


def cut_rows(path):
    path.write_bytes(pack_rows(path, MEMBERS).read_bytes()[:-300])


def compressed(path):
    batch = pq.read_table(pack_rows(path.with_suffix(".parquet"), MEMBERS))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(path), batch.schema, options=options) as out:
        out.write_table(batch)


FAULTS = [
    (".zip", cut_to(150), "no whole zip archive"),
    (".zip", cut_to(-30), "no whole zip archive"),
    *((".tar", cut_to(length), "no whole tar archive") for length in (1100, 1550, 2048, 3100)),
    (".tar", joined, "goes on behind its end"),
    (".zip", write_two_of_one_name, "two members have this name"),
    (".tar", write_two_of_one_name, "two members have this name"),
    (".zip", lambda path: pack(path, [("a/../../b.png", png(1))]), "leads out"),
    (".tar", lambda path: pack(path, [("/etc/b.png", png(1))]), "leads out"),
    (".zip", lambda path: pack(path, [("C:\\b.png", png(1))]), "leads out"),
    (".zip", shared_bytes, "shares its bytes"),
    (".parquet", cut_rows, "no whole parquet archive"),
    (".arrow", cut_rows, "no whole arrow archive"),
    (".parquet", lambda path: pq.write_table(pa.table({"x": [1]}), path), "0 columns of images"),
    (".parquet", lambda path: pack_rows(path, [("../b.png", b"")]), "leads out"),
    (".arrow", compressed, "compressed"),
]


@pytest.mark.parametrize(("suffix", "write", "told"), FAULTS, ids=range(len(FAULTS)))
def test_a_bad_archive_is_one_clear_error(tmp_path, suffix, write, told):
    path = tmp_path / f"bad{suffix}"
    write(path)
    with pytest.raises(ArchiveError, match=f"bad.*{told}"):
        open_archives(path)


@pytest.mark.parametrize(
    ("method", "place", "data", "reason", "told"),
    [
        (zipfile.ZIP_DEFLATED, 24, 2**31, "enormous_image", "the limit is"),
        (zipfile.ZIP_DEFLATED, 24, 1000, "damaged_image", "unpacks to more than the archive says"),
        (zipfile.ZIP_DEFLATED, 24, 10**6 + 1, "damaged_image", "length or checksum"),
        (zipfile.ZIP_STORED, 16, 5, "damaged_image", "length or checksum"),
        (zipfile.ZIP_LZMA, 4, 0, "unsupported_image", "packed in a way that is not read"),
    ],
)
def test_a_member_is_what_the_archive_says_and_no_more(tmp_path, method, place, data, reason, told):
    path = pack(tmp_path / "bomb.zip", [("a.png", bytes(10**6))], method)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\1\2") + place  # 16: the checksum, 24: the size, of the directory
    whole[at : at + 4] = data.to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(ImageError, match=told) as raised:
        read_member(path / "a.png")
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.zip", pack), ("a.tar", pack), ("a.parquet", pack_rows), ("a.arrow", pack_rows)],
)
def test_an_archive_that_changes_while_it_is_used_is_refused(tmp_path, name, pack):
    path = pack(tmp_path / name, MEMBERS)
    assert read_member(path / "a/1.png") == png(1)
    path.unlink()  # what is mapped stays what it was
    pack(path, [("a/1.png", png(7, side=64))])
    with pytest.raises(ArchiveError, match="has changed since its index was made"):
        read_member(path / "a/1.png")
    open_archives(path)  # a new start lists it anew
    assert read_member(path / "a/1.png") == png(7, side=64)


def test_an_image_may_be_its_own_name(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png(200)).decode()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    record = {"image": url, "conversations": turns}
    (image,) = parse_raw(RawRecord("1", "", record), dataset="d").images
    for root in (tmp_path, Path()):
        assert open_rgb(root / image).getpixel((0, 0)) == (200, 200, 200)
        check_image(root / image, level="exists")
    for wrong in (url[:-1], url.replace(";base64", "")):
        with pytest.raises(DataError, match="no image in base64") as raised:
            parse_raw(RawRecord("1", "", {**record, "image": wrong}), dataset="d")
        assert len(str(raised.value)) < 300


def test_records_and_images_lie_in_one_file(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    text = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    images = [{"bytes": png(level), "path": None} for level in (1, 2)]
    table = {"image": pa.array([*images, None], IMAGE), "conversations": [turns, turns, text]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    found = [parse_raw(raw, dataset="d").images for raw in iter_raw(tmp_path / "x.parquet")]
    assert found == [("x.parquet/0",), ("x.parquet/1",), ()]
    assert read_member(tmp_path / "*.parquet" / found[1][0]) == png(2)

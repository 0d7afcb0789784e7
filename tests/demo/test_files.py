"""What is uploaded, by content: pictures of any depth, ZIPs and what they may not do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.demo import files
from gmai_xtuner.demo.files import open_files
from gmai_xtuner.demo.i18n import ERRORS, WORDS, PageError
from gmai_xtuner.demo.limits import Limits, Memory
from gmai_xtuner.demo.studies import View, Volume
from tests import medical_files as made


def opened(tmp_path: Path, limits: Limits | None = None, **contents: bytes):
    uploads = []
    for number, (name, content) in enumerate(contents.items()):
        path = tmp_path / str(number)
        path.write_bytes(content)
        uploads.append((name, path))
    return open_files(uploads, limits or Limits())


def png(size=(8, 6), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, **options).save(buffer, "PNG")
    return buffer.getvalue()


def test_sixteen_bits_are_read_as_in_training(tmp_path):
    ramp = np.linspace(1000, 3000, 48).astype(np.uint16).reshape(6, 8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "TIFF")
    (one,) = opened(tmp_path, scan=buffer.getvalue())
    pixels = np.asarray(one.study.render(View()))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels, np.asarray(open_rgb(tmp_path / "0")))


def test_bad_files_do_not_keep_good_ones_out(tmp_path):
    found = opened(
        tmp_path, good=png(), empty=b"", text=b"hello, this is no picture", cut=png()[:40]
    )
    assert [(one.name, getattr(one.study, "key", "opened")) for one in found] == [
        ("good", "opened"),
        ("empty", "empty_file"),
        ("text", "unsupported"),
        ("cut", "damaged"),
    ]


def test_pixels_are_limited(tmp_path):
    (one,) = opened(tmp_path, Limits(pixels=40), big=png((8, 6)))
    assert one.study.said("en") == (
        "The picture has more than 40 pixels. Shrink it, or cut out the part that matters."
    )
    assert "40" in one.study.said("zh")


def test_a_series_in_a_zip_is_one_volume(tmp_path):
    slices = {f"case/IM{at}": made.as_bytes(data) for at, data in enumerate(made.series())}
    (one,) = opened(
        tmp_path,
        scan=made.zipped(
            {"DICOMDIR": b"x", "__MACOSX/case/._IM0": b"x", ".DS_Store": b"x", **slices}
        ),
    )
    assert isinstance(one.study, Volume)
    assert one.study.length("z") == 5


def test_files_of_a_series_that_come_together_are_one_volume(tmp_path):
    slices = {f"IM{at}": made.as_bytes(data) for at, data in enumerate(made.series())}
    found = opened(tmp_path, **slices, photo=png())
    assert [one.name for one in found] == ["photo", "IM0"]
    assert isinstance(found[1].study, Volume)


def test_a_zip_of_different_things(tmp_path):
    found = opened(
        tmp_path, all=made.zipped({"a/one.png": png(), "b/two.png": png((3, 2)), "c.txt": b"no"})
    )
    assert [(one.name, getattr(one.study, "key", "opened")) for one in found] == [
        ("one.png", "opened"),
        ("two.png", "opened"),
        ("c.txt", "unsupported"),
    ]


def test_a_zip_never_writes_where_its_names_say(tmp_path):
    (one,) = opened(tmp_path, evil=made.zipped({"../../outside.png": png()}))
    assert one.name == "outside.png"
    assert not list(tmp_path.parent.rglob("outside.png"))


@pytest.mark.parametrize(
    ("content", "limits", "key"),
    [
        (made.zipped({}), Limits(), "empty_zip"),
        (made.zipped({"folder/": b""}), Limits(), "empty_zip"),
        (made.zipped({"bomb": bytes(10**6)}), Limits(upload_bytes=10**5), "zip_too_large"),
        (made.zipped({str(n): b"x" for n in range(5)}), Limits(zip_entries=4), "zip_entries"),
        (made.zipped({"inner.zip": made.zipped({"a": b"b"})}), Limits(), "zip_nested"),
    ],
)
def test_zips_that_are_refused(tmp_path, content, limits, key):
    (one,) = opened(tmp_path, limits, upload=content)
    assert one.study.key == key


def test_all_zips_of_an_upload_share_what_they_may_unpack(tmp_path):
    """4 x 1,000 bytes and 3 files in all: two ZIPs of 2,000 bytes fit, a third does not."""
    limits = Limits(upload_bytes=1000, unpacked=4)
    pair = made.zipped({"x": bytes(2000)})
    found = opened(tmp_path, limits, a=pair, b=pair, c=pair)
    assert sorted((one.name, one.study.key) for one in found) == [
        ("c", "zip_too_large"),
        ("x", "unsupported"),
        ("x", "unsupported"),
    ]
    two = made.zipped({"x": b"1", "y": b"2"})
    found = opened(tmp_path, Limits(zip_entries=3), a=two, b=two)
    assert [one.study.key for one in found if one.name == "b"] == ["zip_entries"]
    assert "4" in next(one.study.said("en") for one in found if one.name == "b")


def test_a_zip_with_damaged_lzma(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", bytes(range(256)) * 8)
    damaged = bytearray(buffer.getvalue())
    damaged[35:40] = b"\xff" * 5  # behind the name: the properties of the filter
    (one,) = opened(tmp_path, damaged=bytes(damaged))
    assert (one.name, one.study.key) == ("damaged", "damaged")


def test_a_locked_and_a_damaged_zip(tmp_path):
    whole = made.zipped({"a.png": png() + bytes(range(256)) * 4})
    locked = bytearray(whole)
    directory = whole.rindex(b"PK\x01\x02")
    locked[directory + 8] |= 1
    damaged = bytearray(whole)
    damaged[60:70] = bytes(10)
    found = opened(tmp_path, locked=bytes(locked), damaged=bytes(damaged))
    assert [one.study.key for one in found] == ["zip_encrypted", "damaged"]


def test_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    opened(tmp_path, a=made.zipped({"a.png": png()}), b=made.zipped({"x": b"no"}), c=b"no")
    assert not list((tmp_path / "scratch").iterdir())


def test_memory_is_counted():
    memory = Memory(100)
    memory.take(60)
    with pytest.raises(PageError, match="no room"):
        memory.take(41)
    memory.give_back(60)
    memory.take(100)
    assert memory.used == 100


def test_every_word_has_both_languages():
    for key, pair in {**WORDS, **ERRORS}.items():
        english, chinese = pair
        assert english, key
        assert chinese, key
        fields = [sorted(part.split("}")[0] for part in text.split("{")[1:]) for text in pair]
        assert fields[0] == fields[1], key
        if key not in ("top_p",):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese), key

# SPDX-License-Identifier: Apache-2.0

"""Uploads, opened by their content, and the limits."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.demo.files import open_files
from gmai_xtuner.demo.i18n import ERRORS, WORDS, PageError
from gmai_xtuner.demo.studies import Limits, Memory, View, Volume
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
    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").writestr("a.png", png())
    contents = {"text": b"hello, this is no picture", "zip": archive.getvalue()}
    found = opened(tmp_path, good=png(), empty=b"", cut=png()[:40], **contents)
    assert [(one.name, getattr(one.study, "key", "opened")) for one in found] == [
        ("good", "opened"),
        ("empty", "empty_file"),
        ("cut", "damaged"),
        ("text", "unsupported"),
        ("zip", "zip"),
    ]


def test_pixels_are_limited(tmp_path):
    (one,) = opened(tmp_path, Limits(pixels=40), big=png((8, 6)))
    assert one.study.said("en") == (
        "The picture has more than 40 pixels. Shrink it, or cut out the part that matters."
    )
    assert "40" in one.study.said("zh")


def test_files_of_a_series_that_come_together_are_one_volume(tmp_path):
    slices = {f"IM{at}": made.as_bytes(data) for at, data in enumerate(made.series())}
    found = opened(tmp_path, **slices, photo=png())
    assert [one.name for one in found] == ["photo", "IM0"]
    assert isinstance(found[1].study, Volume)


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
        english, chinese = pair["en"], pair["zh"]
        assert english, key
        assert chinese, key
        fields = [
            sorted(part.split("}")[0] for part in text.split("{")[1:])
            for text in (english, chinese)
        ]
        assert fields[0] == fields[1], key
        if key not in ("top_p",):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese), key

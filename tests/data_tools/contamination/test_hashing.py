# SPDX-License-Identifier: Apache-2.0

"""Hashes of images, and what is kept of them."""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.contamination import hashing
from data_tools.contamination.hashing import (
    MISSING,
    OK,
    PLAIN,
    UNREADABLE,
    Hashed,
    ImageSource,
    hash_image,
    open_cache,
)
from data_tools.executor import open_executor
from data_tools.preprocess.images import read_pixels
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.contamination.sides import as_bytes, picture


def bits(one: Hashed, other: Hashed) -> int:
    return (one.look ^ other.look).bit_count()


def test_the_same_pixels_in_other_files_are_the_same() -> None:
    one = hash_image(as_bytes(picture(0)))
    deep = Image.fromarray(np.asarray(picture(0), dtype=np.uint16) * 257)
    for other in (
        as_bytes(picture(0), "TIFF"),
        as_bytes(picture(0).convert("RGB")),
        as_bytes(picture(0).convert("RGBA")),
        as_bytes(picture(0), "BMP"),
        as_bytes(deep),
    ):
        assert hash_image(other) == one
    assert one.state == OK


def test_changed_pixels_are_not_the_same_but_near() -> None:
    one = hash_image(as_bytes(picture(0)))
    for other in (
        as_bytes(picture(0), "JPEG", quality=60),
        as_bytes(picture(0).resize((200, 200))),
        as_bytes(picture(0).point(lambda level: level // 2 + 40)),
    ):
        near = hash_image(other)
        assert near.pixels != one.pixels
        assert bits(one, near) <= 4
    colour = np.stack([np.asarray(picture(seed)) for seed in (0, 1, 2)], axis=-1)
    turned = colour.copy()
    turned[0, 0, 2] ^= 1  # one bit of one pixel
    first, second = (hash_image(as_bytes(Image.fromarray(one))) for one in (colour, turned))
    assert first.pixels != second.pixels


def test_what_cannot_be_compared_has_a_state() -> None:
    assert hash_image(as_bytes(Image.new("RGB", (9, 9), (3, 4, 5)))).state == PLAIN
    striped = np.zeros((64, 64), dtype=np.uint8)
    striped[5] = 200  # among the rows that are looked at first all are alike
    assert hash_image(as_bytes(Image.fromarray(striped))).state == OK
    broken = hash_image(as_bytes(picture(0))[:200])
    assert (broken.state, bool(broken.problem)) == (UNREADABLE, True)
    assert hash_image(b"").problem == "image is truncated: is empty (0 bytes)"


def hashes(
    cache_file: Path, sources: Sequence[ImageSource], *, workers: int = 1
) -> dict[int, Hashed]:
    with open_cache(cache_file) as cache, open_executor("processes", workers) as executor:
        return dict(cache.hashes(sources, executor))


def test_a_run_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for seed in range(40):
        paths.append(tmp_path / f"{seed}.png")
        picture(seed, side=24).save(paths[-1])
    sources = [ImageSource(number, path) for number, path in enumerate(paths)]
    monkeypatch.setattr(hashing, "_AT_ONCE", 16)
    opened: list[Path] = []

    def stop_at_25(source: Path) -> Hashed:
        opened.append(source)
        if len(opened) == 25:
            raise KeyboardInterrupt
        return hash_image(source)

    monkeypatch.setattr(hashing, "hash_image", stop_at_25)
    with pytest.raises(KeyboardInterrupt):
        hashes(tmp_path / "c.sqlite", sources)
    found = hashes(tmp_path / "c.sqlite", sources)
    assert len(opened) == 25 + 40 - 16  # the first 16 were on disk
    assert found == {number: hash_image(path) for number, path in enumerate(paths)}
    assert found == hashes(tmp_path / "other.sqlite", sources, workers=2)


def test_a_missing_file_is_not_remembered(tmp_path: Path) -> None:
    sources = [ImageSource(0, tmp_path / "a.png")]
    assert hashes(tmp_path / "c.sqlite", sources)[0].state == MISSING
    picture(0).save(tmp_path / "a.png")
    assert hashes(tmp_path / "c.sqlite", sources)[0].state == OK


def test_a_cache_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"no database, but long enough for one" * 50)
    with pytest.raises(CorpusError, match=r"cache of hashes .*c\.sqlite can't be used .* --cache"):
        hashes(tmp_path / "c.sqlite", [])
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="can't be used"):
        hashes(tmp_path / "file" / "c.sqlite", [])


def test_hashes_of_another_version_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(0).save(tmp_path / "a.png")
    sources = [ImageSource(0, tmp_path / "a.png")]
    hashes(tmp_path / "c.sqlite", sources)
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute(f"UPDATE pictures_{hashing.VERSION} SET look = 7")
    assert hashes(tmp_path / "c.sqlite", sources)[0].look == 7
    monkeypatch.setattr(hashing, "VERSION", hashing.VERSION + 1)
    assert hashes(tmp_path / "c.sqlite", sources)[0].look != 7


def test_x_rays_of_real_patients_saved_again(shared_data: Path) -> None:
    paths = sorted((shared_data / "hannover_cxr" / "png").rglob("*.png"))
    ours, theirs = [], []
    for path in paths:
        ours.append(hash_image(path))
        small = Image.fromarray(read_pixels(path).pixels)
        small.thumbnail((300, 300))
        theirs.append(hash_image(as_bytes(small, "JPEG", quality=70)))
    apart = np.array([[bits(one, other) for other in theirs] for one in ours])
    copies = np.eye(len(paths), dtype=bool)
    assert len(paths) == 40
    assert apart[copies].max() <= 4
    assert apart[~copies].min() > 8
    assert (apart[~copies] <= 16).mean() < 0.1


def crashing(sources: Sequence[Path | bytes]) -> list[tuple[Hashed, bytes]]:
    """Ends its process at one picture, as a decoder with a fault does."""
    if any(isinstance(source, Path) and source.name == "3.png" for source in sources):
        os._exit(1)
    return [(hash_image(source), b"") for source in sources]


def test_a_picture_that_crashes_its_decoder_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        picture(seed, side=24).save(tmp_path / f"{seed}.png")
    sources = [ImageSource(seed, tmp_path / f"{seed}.png") for seed in range(6)]
    monkeypatch.setattr(hashing, "_task", crashing)
    found = hashes(tmp_path / "c.sqlite", sources, workers=2)
    assert {number: one.state for number, one in found.items()} == {
        number: UNREADABLE if number == 3 else OK for number in range(6)
    }
    assert found[3].problem == "image can't be read: its decoder crashed"

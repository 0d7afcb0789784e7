# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gmai_xtuner.data.held_out import (
    HELD_OUT,
    NEITHER,
    TRAIN,
    hashes,
    nothing_held_out,
    sides,
)

MASK = 2**64 - 1


def slow_hash(text: str) -> int:
    """The same function, one byte after the other in Python's own integers."""
    factor, value, power = 0x9E3779B97F4A7C15, 0x9E3779B97F4A7C15, 1
    for byte in text.encode():
        value = (value + (byte + 1) * power) & MASK
        power = power * factor & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def write_cache(folder: Path, rows: list[tuple[str, list[str]]], *, rows_a_batch: int = 3) -> Path:
    """As much of a token cache as sides are made from."""
    folder.mkdir(parents=True)
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(pa.string()))])
    with (
        pa.OSFile(str(folder / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, schema) as out,
    ):
        for start in range(0, len(rows), rows_a_batch):
            part = rows[start : start + rows_a_batch]
            columns = [
                pa.array([name for name, _ in part], pa.string()),
                pa.array([images for _, images in part], pa.list_(pa.string())),
            ]
            out.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return folder


def test_hash_is_the_same_everywhere_and_for_good():
    texts = ["", "a.png", "a.pnh", "图像/肝脏.png", "x" * 300, "\0", "\0\0", "a.png"]
    array = pa.array(texts, pa.string())
    assert hashes(array).tolist() == [slow_hash(text) for text in texts]
    assert hashes(array[2:5]).tolist() == [slow_hash(text) for text in texts[2:5]]
    assert hashes(pa.array([], pa.string())).tolist() == []
    assert len({slow_hash(text) for text in texts}) == len(texts) - 1
    # Another value here would move images from one side to the other in everyone's runs.
    assert slow_hash("a.png") == 16389314028566253917


def test_names_that_count_up_are_spread_evenly():
    names = pa.array([f"images/{number:07d}.png" for number in range(100_000)])
    shares = np.bincount(hashes(names) >> np.uint64(60), minlength=16) / 100_000
    assert shares == pytest.approx(1 / 16, rel=0.05)
    assert (hashes(names) < np.uint64(0.001 * 2**64)).sum() == pytest.approx(100, abs=40)


def test_conversations_of_an_image_are_on_one_side(tmp_path):
    rows = [(f"q{number}", [f"{number // 5}.png"]) for number in range(500)]
    result = sides(write_cache(tmp_path / "cache", rows), 0.2)
    by_image = result.side.reshape(100, 5)
    assert (by_image == by_image[:, :1]).all()
    assert set(result.side.tolist()) == {TRAIN, HELD_OUT}
    assert 10 <= (by_image[:, 0] == HELD_OUT).sum() <= 30


def test_a_conversation_with_images_of_both_sides_is_on_neither(tmp_path):
    names = [f"{number}.png" for number in range(40)]
    share = 0.5
    held = [name for name in names if slow_hash(name) < share * 2**64]
    kept = [name for name in names if name not in held]
    rows = [
        ("both", [held[0], kept[0]]),
        ("out", [held[0], held[1]]),
        ("in", [kept[0], kept[1], kept[1]]),
        ("in", [kept[2]]),
        ("out", [held[2]]),
    ]
    result = sides(write_cache(tmp_path / "cache", rows), share)
    assert result.side.tolist() == [NEITHER, HELD_OUT, TRAIN, TRAIN, HELD_OUT]


def test_a_conversation_without_images_goes_by_its_id(tmp_path):
    rows = [(f"r{number // 2}", []) for number in range(200)] + [("r0", ["r0"])]
    result = sides(write_cache(tmp_path / "cache", rows), 0.3)
    expected = [HELD_OUT if slow_hash(name) < 0.3 * 2**64 else TRAIN for name, _ in rows]
    assert result.side.tolist() == expected
    assert 20 < sum(expected) < 100


def test_side_depends_on_the_name_and_share_alone(tmp_path):
    rows = [(f"a{number}", [f"{number}.png"]) for number in range(300)]
    one = sides(write_cache(tmp_path / "one", rows), 0.1)
    # Another dataset with other ids, in another order, with more images.
    other_rows = [("b", [f"{number}.png"]) for number in reversed(range(600))]
    other = sides(write_cache(tmp_path / "two", other_rows, rows_a_batch=7), 0.1)
    assert one.side.tolist() == other.side[::-1][:300].tolist()
    # A larger share takes more, and what was held out stays so.
    larger = sides(tmp_path / "one", 0.2)
    assert set(one.rows(HELD_OUT)) < set(larger.rows(HELD_OUT))


def test_at_most_takes_the_same_ones_whatever_else_is_held_out(tmp_path):
    rows = [(f"a{number}", [f"{number}.png"]) for number in range(300)]
    some = sides(write_cache(tmp_path / "cache", rows), 0.1).rows(HELD_OUT, at_most=5)
    more = sides(tmp_path / "cache", 0.3).rows(HELD_OUT, at_most=5)
    assert len(some) == 5
    assert some.tolist() == more.tolist() == sorted(some)
    assert len(sides(tmp_path / "cache", 0.1).rows(HELD_OUT, at_most=1000)) > 5


def test_an_empty_cache_has_no_sides(tmp_path):
    assert sides(write_cache(tmp_path / "cache", []), 0.5).side.tolist() == []


def test_the_smallest_share_that_holds_something_out_is_said_and_does(tmp_path):
    def least(told: str) -> float:
        return float(told.rpartition(" is ")[2])

    # 95 conversations of ten images, as a small hospital's first set.
    rows = [(f"q{number}", [f"scan{number % 10}.png"]) for number in range(95)]
    cache = write_cache(tmp_path / "few", rows, rows_a_batch=40)
    told = nothing_held_out(0.05, [cache], [None])
    assert told.startswith("0.05 of 10 images; hashes of the names decide")
    lowest = min(slow_hash(f"scan{number}.png") for number in range(10)) / 2**64
    assert lowest < least(told) < 1.11 * lowest  # two digits, rounded up
    assert (sides(cache, least(told)).side == HELD_OUT).any()
    assert not (sides(cache, lowest).side == HELD_OUT).any()

    # Without the image that would be held out first; with one of two images, and one without any.
    first = min(range(10), key=lambda number: slow_hash(f"scan{number}.png"))
    mask = np.array([number % 10 == first for number in range(95)])
    other = nothing_held_out(0.05, [cache], [mask])
    assert other.startswith("0.05 of 9 images;")
    assert (sides(cache, least(other)).side[~mask] == HELD_OUT).any()
    assert least(other) > least(told)
    pair = write_cache(tmp_path / "pair", [("both", ["a.png", "scan1.png"]), ("text", [])])
    told = nothing_held_out(0.01, [pair], [None])
    assert told.startswith("0.01 of 2 images and 1 conversation without an image;")
    ends = max(slow_hash("a.png"), slow_hash("scan1.png")), slow_hash("text")
    assert min(ends) / 2**64 < least(told) < 1.11 * min(ends) / 2**64

    one = write_cache(tmp_path / "one", [("q1", ["a.png"]), ("q2", ["a.png"])])
    assert nothing_held_out(0.05, [one], [None]).endswith(
        "No share holds something out and leaves something to train on"
    )

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_tools.records import Unit
from data_tools.worker import unit_fingerprint


@dataclass(frozen=True)
class Payload:
    row: dict[str, str]
    files: tuple[Path, ...]
    boxes: np.ndarray


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    (tmp_path / "series").mkdir()
    for name in ("a.png", "mask.png", "series/1.dcm", "seen.png"):
        (tmp_path / name).write_bytes(b"12345")
    return Unit("a.png", Payload({"x1": "3"}, (tmp_path / "mask.png", Path("series")), np.zeros(2)))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_it_is_the_same_in_every_process(tmp_path, unit):
    code = (
        "import sys; from pathlib import Path; from data_tools.records import Unit;"
        "from data_tools.worker import unit_fingerprint; p = Path(sys.argv[1]);"
        "print(unit_fingerprint(p, Unit('a.png', {'x': {'b', 'a'}, 'f': ('mask.png', 1.5, None)})).hex())"
    )
    here = unit_fingerprint(
        tmp_path, Unit("a.png", {"x": {"a", "b"}, "f": ("mask.png", 1.5, None)})
    ).hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "5"},
    )
    assert done.stdout.strip() == here


@pytest.mark.parametrize("name", ["a.png", "mask.png", "series/1.dcm", "seen.png"])
def test_a_change_of_any_file_of_the_unit_is_noticed(tmp_path, unit, name):
    before = unit_fingerprint(tmp_path, unit, ["seen.png"])
    assert unit_fingerprint(tmp_path, unit, ["seen.png"]) == before
    touch(tmp_path / name)
    assert unit_fingerprint(tmp_path, unit, ["seen.png"]) != before


def test_a_new_file_of_a_folder_and_a_vanished_file_are_noticed(tmp_path, unit):
    marks = [unit_fingerprint(tmp_path, unit)]
    (tmp_path / "series" / "2.dcm").write_bytes(b"")
    marks.append(unit_fingerprint(tmp_path, unit))
    (tmp_path / "mask.png").unlink()
    marks.append(unit_fingerprint(tmp_path, unit))
    assert len(set(marks)) == 3


def test_what_the_payload_says_counts(tmp_path):
    payloads = [
        {"a": "1"},
        {"a": 1},
        {"a": "2"},
        ["a", "1"],
        [["a"], "1"],
        None,
        np.zeros(2),
        np.ones(2),
    ]
    assert len({unit_fingerprint(tmp_path, Unit("k", payload)) for payload in payloads}) == len(
        payloads
    )


def test_other_files_do_not_count(tmp_path, unit):
    before = unit_fingerprint(tmp_path, unit)
    touch(tmp_path / "seen.png")
    (tmp_path / "new.png").write_bytes(b"")
    assert unit_fingerprint(tmp_path, unit) == before


def test_a_set_that_was_moved_is_the_same_set(tmp_path, unit):
    before = unit_fingerprint(tmp_path, unit)
    moved = tmp_path.with_name(f"{tmp_path.name} moved")
    tmp_path.rename(moved)
    payload = Payload(unit.payload.row, (moved / "mask.png", Path("series")), unit.payload.boxes)
    assert unit_fingerprint(moved, Unit(unit.key, payload)) == before


def test_a_payload_that_can_not_be_compared_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected plain values"):
        unit_fingerprint(tmp_path, Unit("k", object()))

# SPDX-License-Identifier: Apache-2.0

"""A run that is killed at each of its stages, and run again, ends with the corpus of an undisturbed run."""

import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.data_tools.conftest import command, draw, files_of, generate

CLASSES = ("adipose", "debris", "lymphocytes", "mucus", "muscle", "stroma", "tumour")
PICTURES = 320


@pytest.mark.slow
def test_killed_at_every_stage(make_job, tmp_path):
    classes = tmp_path / "classes"
    for number in range(PICTURES):
        # two sources, as those of one are made 1,000 at a time; some pictures are in both
        folder = tmp_path / ("classes", "others")[number % 2]
        draw(folder / CLASSES[number % 7] / f"{number}.png", number % 311, side=32)
    cut = (classes / CLASSES[0] / "0.png").read_bytes()[:900]
    (classes / CLASSES[0] / "cut.png").write_bytes(cut)
    sources = ({}, {"name": "others", "root": str(tmp_path / "others")})
    alone, job = make_job(*sources, name="alone.yaml"), make_job(*sources, workers=2)
    assert generate(alone, "--output", tmp_path / "undisturbed").returncode == 0
    units, items = progress(tmp_path / "undisturbed")
    assert units == PICTURES + 1

    output = tmp_path / "killed"
    found = []
    for reached in (
        (output / ".work" / "state.sqlite").exists,
        lambda: progress(output)[0] >= units // 2,
        lambda: progress(output)[1] >= 1,
        lambda: any((output / ".work" / "corpus.new").glob("*.jsonl")),
    ):
        kill_when(reached, command(job, "--output", output))
        found.append(progress(output))
        assert not (output / "summary.json").exists()
    # The interesting moments occurred: while reading, while making, and with nothing left but to write.
    assert 0 < found[1][0] < units
    assert 0 < found[2][1] < items
    assert found[3] == (units, items)
    made = generate(alone, "--output", output)
    assert made.returncode == 0, made.stderr
    killed, expected = files_of(output), files_of(tmp_path / "undisturbed")
    assert killed.keys() == expected.keys()
    assert [name for name in killed if killed[name] != expected[name]] == []


def kill_when(reached: Callable[[], bool], run: list[str]) -> None:
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()


def progress(output: Path) -> tuple[int, int]:
    """Units and items that are kept."""
    file = output / ".work" / "state.sqlite"
    if not file.exists():
        return 0, 0
    with closing(sqlite3.connect(file, timeout=60)) as state:
        try:
            return tuple(
                state.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("units", "items")
            )  # type: ignore[return-value]
        except sqlite3.OperationalError:  # killed before the tables were there
            return 0, 0

"""A run that is killed at any moment, and run again, ends with the corpus of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tests.data_tools.conftest import command, draw, files_of, generate
from tests.data_tools.test_generate import wait_for

KILLS = 20
KILLS_OF_A_CORPUS = 5


@pytest.mark.slow
def test_twenty_kills(make_job, tmp_path):
    classes = tmp_path / "classes"
    for number in range(400):
        draw(classes / f"class {number % 7}" / f"{number}.png", number % 390, side=96)
    (classes / "class 0" / "cut.png").write_bytes(
        (classes / "class 0" / "0.png").read_bytes()[:900]
    )
    job = make_job({}, workers=2)
    started = time.monotonic()
    made = generate(job, "--output", tmp_path / "undisturbed")
    assert made.returncode == 0, made.stderr
    seconds = time.monotonic() - started
    expected = files_of(tmp_path / "undisturbed")

    dice = random.Random(4)
    moments = []
    for kill in range(KILLS):
        output = tmp_path / f"killed {kill // KILLS_OF_A_CORPUS}"
        if kill % KILLS_OF_A_CORPUS == 0:
            shutil.rmtree(output, ignore_errors=True)
        process = subprocess.Popen(
            command(job, "--output", output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(output / ".work" / "state.sqlite", process)
        time.sleep(dice.uniform(0, seconds))
        process.kill()
        process.wait()
        moments.append(progress(output))
        if kill % KILLS_OF_A_CORPUS == KILLS_OF_A_CORPUS - 1:
            made = generate(job, "--output", output)
            assert made.returncode == 0, made.stderr
            found = files_of(output)
            assert found.keys() == expected.keys()
            assert [name for name in found if found[name] != expected[name]] == []
    # The interesting moments occurred: while reading and afterwards.
    assert any(0 < units < 401 for units, _ in moments), moments
    assert any(items > 0 for _, items in moments), moments


def progress(output: Path) -> tuple[int, int]:
    """Units and items that are kept."""
    with sqlite3.connect(output / ".work" / "state.sqlite") as state:
        try:
            return tuple(
                state.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("units", "items")
            )  # type: ignore[return-value]
        except sqlite3.OperationalError:  # killed before the tables were there
            return 0, 0

# SPDX-License-Identifier: Apache-2.0

"""A run that is killed at any moment, and run again, ends with the corpus of an undisturbed run."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.data_tools.conftest import command, draw, files_of, generate
from tests.data_tools.test_generate import wait_for

pytestmark = pytest.mark.slow

CORPORA = 4
KILLS_OF_A_CORPUS = 5
CLASSES = ("adipose", "debris", "lymphocytes", "mucus", "muscle", "stroma", "tumour")
PICTURES = 2100  # made of 1,000 at a time


@pytest.mark.slow
def test_twenty_kills(make_job, tmp_path):
    classes = tmp_path / "classes"
    for number in range(PICTURES):
        draw(classes / CLASSES[number % 7] / f"{number}.png", number % 2070, side=64)
    (classes / CLASSES[0] / "cut.png").write_bytes(
        (classes / CLASSES[0] / "0.png").read_bytes()[:900]
    )
    job = make_job({}, workers=2)
    started = time.monotonic()
    made = generate(job, "--output", tmp_path / "undisturbed")
    assert made.returncode == 0, made.stderr
    seconds = time.monotonic() - started
    expected = files_of(tmp_path / "undisturbed")
    units, items = progress(tmp_path / "undisturbed")
    assert units == PICTURES + 1

    dice = random.Random(4)
    moments = []
    for number in range(CORPORA):
        output = tmp_path / f"killed {number}"
        first, second = sorted(dice.sample(range(1, units * 3 // 4), 2))
        # Whatever it does first, while it reads, while it makes, and at any moment.
        for until in (
            after(dice.uniform(0, seconds / 4)),
            kept(output, units=first),
            kept(output, units=second),
            kept(output, items=1 + dice.randrange(items // 2)),
            after(dice.uniform(0, seconds)),
        ):
            process = subprocess.Popen(
                command(job, "--output", output),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_for(output / ".work" / "state.sqlite", process)
            until(process)
            process.kill()
            process.wait()
            moments.append(progress(output))
        made = generate(job, "--output", output)
        assert made.returncode == 0, made.stderr
        found = files_of(output)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert len(moments) == 20
    # The interesting moments occurred: while reading and while making.
    assert any(0 < done < units for done, _ in moments), moments
    assert any(0 < done < items for _, done in moments), moments


def after(seconds: float) -> Callable[[subprocess.Popen], None]:
    """Wait for a time."""
    return lambda process: time.sleep(seconds)


def kept(output: Path, *, units: int = 0, items: int = 0) -> Callable[[subprocess.Popen], None]:
    """Wait until so much is kept, or the run is over."""

    def wait(process: subprocess.Popen) -> None:
        while process.poll() is None:
            found = progress(output)
            if found[0] >= units and found[1] >= items:
                return
            time.sleep(0.001)

    return wait


def progress(output: Path) -> tuple[int, int]:
    """Units and items that are kept."""
    with closing(sqlite3.connect(output / ".work" / "state.sqlite", timeout=60)) as state:
        try:
            return tuple(
                state.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("units", "items")
            )  # type: ignore[return-value]
        except sqlite3.OperationalError:  # killed before the tables were there
            return 0, 0

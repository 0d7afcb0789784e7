# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools.generate import main

COMMAND = Path(__file__).parents[2] / "data_tools" / "generate.py"


def draw(path: Path, number: int, *, side: int = 48) -> None:
    """A picture of its own for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Six pictures of two classes, one folder each."""
    root = tmp_path / "classes"
    for number in range(6):
        draw(root / ("NORM" if number % 2 else "TUM") / f"image {number}.png", number)
    return root


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Path]:
    """Writes a job file. Arguments: entries of ``sources``, then keys of the job."""

    def make(*sources: Mapping[str, Any], name: str = "job.yaml", **keys: Any) -> Path:
        shown = {"anonymous_names": False}  # tests find records by their files
        entries = [shown | source_of(tmp_path / "classes") | dict(source) for source in sources]
        path = tmp_path / name
        values = {"output": "out", "workers": 1, "sources": entries} | keys
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return make


def source_of(root: Path) -> dict[str, Any]:
    return {
        "name": "tissue",
        "reader": "image_folder",
        "root": str(root),
        "licence": "CC BY 4.0",
        "modality": "Microscopy",
        "department": "Laboratory Medicine and Pathology",
    }


def command(*arguments: Any) -> list[str]:
    return [sys.executable, str(COMMAND), *map(str, arguments)]


def generate(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(one) for one in arguments])
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything in a corpus but the state of the job and how long it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".work/"):
            data = path.read_bytes()
            if name == "summary.json":
                lines = data.splitlines()
                kept = [line for line in lines if not line.strip().startswith(b'"seconds":')]
                assert len(kept) == len(lines) - 1
                data = b"\n".join(kept)
            elif name == "report.html":
                data, times = re.subn(rb"<tr><td>time</td>.*?</tr>", b"", data)
                assert times == 1
            found[name] = data
    return found

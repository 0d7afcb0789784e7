# SPDX-License-Identifier: Apache-2.0

"""What the benchmarks share: one result on stdout, the machine it was measured on, the peers' place."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WORK_DIR = REPOSITORY / "work_dirs" / "benchmarks"
TRL = "trl==0.24.0"


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=(description or "").strip().splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    made.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="what is made once and kept for the next run",
    )
    made.add_argument("--seed", type=int, default=0)
    return made


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries print on stdout to stderr: stdout is for the result alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result with the machine: one JSON object, or a table."""
    result = {**result, "machine": machine()}
    if as_json:
        print(json.dumps(result))
        return
    width = max(len(key) for key in result)
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{key}:")
            _print_rows(value)
        else:
            print(f"{key:<{width}}  {_short(value)}")


def _print_rows(rows: list[Mapping[str, Any]]) -> None:
    columns = list(rows[0])
    cells = [columns, *([_short(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  " + "  ".join(f"{cell:<{size}}" for cell, size in zip(line, widths, strict=True)))


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """Processor, cores, memory, Python."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory = float("nan")
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def peak_gib() -> float:
    """Largest resident memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def find_trl(work_dir: Path) -> bool:
    """Make ``trl`` importable, installed beside the environment and without its dependencies.

    TRL 0.24 asks for a newer transformers than the one that xtuner 0.2.0 pins; its packing needs only
    ``datasets`` and ``pyarrow``, which are there. Says on stderr what to do where pip fails.
    """
    folder = work_dir / TRL.replace("==", "-")
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--target", str(folder), TRL], stdout=sys.stderr, check=False
        )
        if done.returncode:
            print(
                f"TRL is not measured: {' '.join(command)} --target {folder} {TRL} failed. "
                "Run it where there is a package index, and this again.",
                file=sys.stderr,
            )
            return False
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return True

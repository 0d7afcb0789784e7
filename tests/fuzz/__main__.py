# SPDX-License-Identifier: Apache-2.0

"""``python -m tests.fuzz [--cases N] [--seed N] [--only TARGET]``: mutate valid files and open each.

A fault is an error that is not documented, a case above 10 s of computing, or one that adds 1 GiB. Exit
status 1 if there is one; the smallest case of each is printed. `tests/fuzz/test_fuzz.py` is the short form.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from gmai_xtuner.core.errors import GMAIError
from tests.fuzz.mutations import STEPS, Step, mutated
from tests.fuzz.targets import Target, targets

SECONDS, MEMORY = 10.0, 2**30


class Costly(Exception):
    """A case took more than is allowed."""


@dataclass
class Tally:
    """What the cases of a target took."""

    cases: int = 0
    opened: int = 0
    slowest: float = 0.0
    most: int = 0
    refused: str = ""


def peak() -> int:
    return (
        max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        * 1024
    )


def held() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def attempt(target: Target, folder: Path, name: str, content: bytes, tally: Tally) -> None:
    """Open one mutated file.

    Raises:
        Exception: one that is not documented, or `Costly`.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    before, began = held(), time.process_time()
    tally.cases += 1
    try:
        target.open(folder, name)
        tally.opened += 1
    except GMAIError as error:
        tally.refused = str(error)
    finally:
        seconds, more = time.process_time() - began, max(0, peak() - before)
        tally.slowest = max(tally.slowest, seconds)
        tally.most = max(tally.most, more)
        path.unlink()
    if seconds > SECONDS or more > MEMORY:
        raise Costly(f"{seconds:.1f} s, {more / 2**20:.0f} MiB")


def fuzz(target: Target, folder: Path, *, cases: int, start: int | None) -> Tally:
    """Open so many cases; ``start`` seeds them, None takes the same ones every time.

    Raises:
        Exception: the smallest case that is a fault, see `attempt`.
    """
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in target.seeds.items():  # a valid file is opened
        attempt(target, folder, name, content, tally)
        assert tally.opened == tally.cases, f"{name} is refused as it is: {tally.refused}"

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=start is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(target.seeds)), STEPS)
    def run(name: str, steps: list[Step]) -> None:
        attempt(target, folder, name, mutated(target.seeds[name], steps), tally)

    (seed(start)(run) if start is not None else run)()
    return tally


def quiet() -> None:
    """Silence what readers say about bad files; nothing here looks at it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--only", action="append", default=[], help="part of a target's name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    rows, faults = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = targets(folder)
        chosen = {
            n: t for n, t in found.items() if not options.only or any(o in n for o in options.only)
        }
        for number, (which, target) in enumerate(chosen.items()):
            began, fault = time.process_time(), ""
            tally = Tally()
            try:
                tally = fuzz(
                    target,
                    folder / "cases" / str(number),
                    cases=options.cases // len(chosen),
                    start=options.seed,
                )
            except Exception as error:
                faults += 1
                fault = f"{type(error).__name__}: {error}"[:300]
                if not options.json:
                    import traceback

                    traceback.print_exc()
            counts = {"cases": tally.cases, "opened": tally.opened, "MiB": tally.most // 2**20}
            times = {
                "seconds": round(time.process_time() - began, 1),
                "slowest": round(tally.slowest, 2),
            }
            rows.append({"target": which, **counts, **times, "fault": fault})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(folder / "cases", ignore_errors=True)
    total = {key: sum(row[key] for row in rows) for key in ("cases", "seconds")}  # type: ignore[misc]
    report = {"seed": options.seed, **total, "faults": faults}
    print(json.dumps(report | {"targets": rows} if options.json else report))
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

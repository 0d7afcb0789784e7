# SPDX-License-Identifier: Apache-2.0

"""``python -m tests.fuzz.guided [--seconds N] [--only TARGET]``: mutate on what reaches new branches.

atheris (libFuzzer) sees which branches of the project's readers a file reaches, which `python -m tests.fuzz`
does not. A fault is the same as there; exit status 1 if there is one, and its file is kept below
``work_dirs/fuzz``: the first byte chooses the name among the target's seeds, the rest is the content.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.mutations import NUMBERS, WORDS

KEPT = Path("work_dirs/fuzz")
LIMITS = ("-rss_limit_mb=4096", "-timeout=60", "-max_len=300000", "-print_final_stats=1")


def run(which: str, folder: Path, seconds: int) -> None:
    """Mutate one target's seeds until the time is up, or a fault ends the process."""
    import atheris

    with atheris.instrument_imports(include=["gmai_xtuner", "data_tools"]):
        from tests.fuzz.__main__ import Tally, attempt, quiet
        from tests.fuzz.targets import targets

        quiet()

        target, tally = targets(folder)[which], Tally()
        names = sorted(target.seeds)
        for number, name in enumerate(names):
            seed = folder / "corpus" / f"{number}"
            seed.parent.mkdir(exist_ok=True)
            seed.write_bytes(bytes([number]) + target.seeds[name])
        lines = ["".join(f"\\x{byte:02x}" for byte in one) for one in (*NUMBERS, *WORDS) if one]
        (folder / "words").write_text("\n".join(f'"{line}"' for line in lines if len(line) < 256))

        def open_one(content: bytes) -> None:
            if content:
                name = names[content[0] % len(names)]
                attempt(target, folder / "cases", name, content[1:], tally)

        options = (f"-max_total_time={seconds}", f"-dict={folder / 'words'}", *LIMITS)
        kept = f"-artifact_prefix={KEPT / which.replace(' ', '_')}-"
        atheris.Setup([which, kept, *options, str(folder / "corpus")], open_one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--only", action="append", default=[], help="part of a target's name")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        if options.target:
            run(options.target, Path(name), options.seconds)
        from tests.fuzz.targets import targets

        names = list(targets(Path(name)))
    faults = 0
    for which in names:
        if options.only and not any(one in which for one in options.only):
            continue
        command = [sys.executable, "-m", "tests.fuzz.guided", "--target", which]
        child = subprocess.run(
            [*command, "--seconds", str(options.seconds)], capture_output=True, text=True
        )
        counts = re.findall(r"stat::number_of_executed_units: +(\d+)", child.stderr)
        branches = [int(one) for one in re.findall(r" cov: (\d+)", child.stderr)]
        row = {"target": which, "cases": int(counts[-1]) if counts else 0}
        row |= (
            {"branches, of the seeds": branches[0], "at the end": branches[-1]} if branches else {}
        )
        if child.returncode:
            faults += 1
            print(child.stderr[-4000:], file=sys.stderr)
        print(json.dumps(row | {"fault": bool(child.returncode)}), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

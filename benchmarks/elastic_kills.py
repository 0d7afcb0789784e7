# SPDX-License-Identifier: Apache-2.0

"""Runs killed again and again, resumed on 1, 2 or 4 ranks by other ZeRO stages -> samples lost or seen twice.

Every start of a run takes a layout at random and is killed at a random moment (between two iterations, with
half a checkpoint on the disk, or before the pointer is written) in a random rank, until the run is through;
then the next run begins. Of each run, the samples of every optimiser step, and the weights at its end, must
be those of a run that was never stopped.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from printing import REPOSITORY, parser, quiet_stdout, show

PACKS = 22
LAYOUTS = [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
"""Ranks, packs of a micro-batch, micro-batches of a step."""
MOMENTS = ("between", "between", "writing", "renamed")


class Runs:
    """Starts of runs in one folder with tiny bases and a corpus in which every record fills a pack."""

    def __init__(self, folder: Path) -> None:
        from examples.tiny_bases import write_tiny_bases
        from tests.commands.killing import CONFIG
        from tests.toy import record, write_corpus

        self.folder = folder
        write_tiny_bases(folder)
        names = [f"{number}.png" for number in range(PACKS)]
        question = "<image>\nWhich number? " + "Look closely. " * 5
        records = [record(name, question, f"It is {name}.", image=name) for name in names]
        self.mixture = write_corpus(folder / "corpus", {"toy": records}, images=names).mixture
        (folder / "config.py").write_text(CONFIG)

    def start(
        self, name: str, zero: int, layout: tuple[int, int, int], kill: str = "none:0:0"
    ) -> str:
        from tests.commands.killing import OPTIONS
        from tests.commands.runner import Xtuner

        ranks, size, count = layout
        xtuner = Xtuner.tiny(
            self.folder,
            self.mixture,
            self.folder / "cache",
            GMAI_TEST_KILL=kill,
            PYTHONPATH=REPOSITORY,
        )
        return xtuner(
            "train", self.folder / "config.py", "--work-dir", self.folder / name, "--resume",
            self.folder / name, "--deepspeed", REPOSITORY / f"tests/commands/zero{zero}_fp32.json",
            "--cfg-options", *OPTIONS, f"train_dataloader.batch_size={size}",
            f"optim_wrapper.accumulative_counts={count}", ranks=ranks,
        )  # fmt: skip

    def is_finished(self, name: str) -> bool:
        from gmai_xtuner.train.status import stored_status

        return stored_status(self.folder / name).get("state") == "finished"


def compare(one: Path, other: Path) -> tuple[int, int, float]:
    """Return samples lost, samples seen twice, and the largest difference of a weight."""
    from collections import Counter

    from gmai_xtuner.checkpoint.training import load_checkpoint_state
    from tests.commands.killing import samples_of_steps

    expected, found = samples_of_steps(one), samples_of_steps(other)
    steps = expected.keys() | found.keys()
    lost = [Counter(expected.get(n, [])) - Counter(found.get(n, [])) for n in steps]
    twice = [Counter(found.get(n, [])) - Counter(expected.get(n, [])) for n in steps]
    first, last = load_checkpoint_state(one), load_checkpoint_state(other)
    apart = max(float((first[name] - last[name]).detach().abs().max()) for name in first)
    return sum(map(Counter.total, lost)), sum(map(Counter.total, twice)), apart


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--minutes", type=float, default=1e6, help="no new run begins after these")
    args = options.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    rng, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    totals: dict[str, Any] = {
        "runs": 0,
        "kills": 0,
        "lost": 0,
        "twice": 0,
        "apart": 0.0,
        "resumes": {},
    }
    with quiet_stdout(), tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name))
        runs.start("whole", 2, (1, 1, 4))
        while totals["kills"] < args.kills and time.monotonic() < end:
            before, kills = 0, 0
            while not runs.is_finished("cut"):
                layout = rng.choice(LAYOUTS)
                # Some starts get far, some not to their first checkpoint: then nothing is gained.
                kill = f"{rng.choice(MOMENTS)}:+{rng.randint(1, 3 * layout[2])}:{rng.randrange(layout[0])}"
                said = runs.start("cut", rng.choice((2, 3)), layout, kill)
                if "Going on from" in said and before:
                    change = f"{before} -> {layout[0]}"
                    totals["resumes"][change] = totals["resumes"].get(change, 0) + 1
                if "Error" in said:
                    print(said[-3000:], file=sys.stderr)
                kills += not runs.is_finished("cut")
                before = layout[0]
            lost, twice, apart = compare(runs.folder / "whole", runs.folder / "cut")
            totals = {
                **totals,
                "runs": totals["runs"] + 1,
                "kills": totals["kills"] + kills,
                "lost": totals["lost"] + lost,
                "twice": totals["twice"] + twice,
                "apart": max(totals["apart"], apart),
            }
            print(totals, file=sys.stderr, flush=True)
            shutil.rmtree(runs.folder / "cut")
    show(totals, as_json=args.json)


if __name__ == "__main__":
    main()

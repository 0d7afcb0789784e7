# SPDX-License-Identifier: Apache-2.0

"""The ablation of section 5.5: the same training with and without the generated corpus, tiny.

    python examples/ablation/run.py --work-dir work_dirs/ablation

Trains stage 3 twice by ``xtuner train``, the two runs differing in the mixture file alone, asks both the
same held-out questions by ``python -m gmai_xtuner.evaluate``, and compares them by its paired test. The
commands are those of the paper's scale (docs/ablation.md). Helpers and options of a run of minutes are the
quickstart's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

import run as quickstart  # noqa: E402
from run import ROOT, StepError  # noqa: E402

from gmai_xtuner.train.status import stored_status  # noqa: E402

RUNS = ("with", "without")
CONFIG = "stage3_instruct"
MADE = ("bases", "data", "cache", *RUNS, "export", "evaluation")
MARK = ".ablation"
# From random bases stage 3 learns everything at once; the first two stages would only cost time here.
OPTIONS = {
    **quickstart.OVERRIDES["all"],
    **quickstart.OVERRIDES["stage3"],
    "model.pretrained_pth": None,
    "train_dataloader.dataset.held_out": 0,
    "default_hooks.checkpoint.save_optimizer": False,
}
SLAKE = ["--benchmark", "slake", "--variant", "en", "--protocol", "full-1061"]


class Ablation:
    """The steps in their order; each stops the rest if it fails.

    Args:
        work_dir: is made; must be empty or an ablation's.
        iterations: micro-batches of each run; default: epochs, so that the larger mixture trains longer,
            as in the paper.
        epochs: of each run, where no iterations are given.
        data: options of ``data.py``.
        limit: questions asked; default: all.
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        iterations: int | None = None,
        epochs: float = 4,
        data: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        self.work_dir = work_dir
        self.iterations, self.epochs, self.limit = iterations, epochs, limit
        self.data = list(data)

    def run(self) -> list[dict]:
        """All steps; the comparison, as ``compare --json`` prints it."""
        self._claim()
        for name in MADE:
            shutil.rmtree(self.work_dir / name, ignore_errors=True)
        bases, data = str(self.work_dir / "bases"), str(self.work_dir / "data")
        self._step("bases", ["python", "-m", "gmai_xtuner.tiny_bases", bases])
        self._step("data", ["python", "examples/ablation/data.py", data, *self.data])
        for name in RUNS:
            self._step(name, self.train_command(name), mixture=name)
            export = self.work_dir / "export" / name
            convert = ["xtuner", "convert", "pth_to_hf", f"configs/gmai_vl/{CONFIG}.py"]
            convert += [str(self.work_dir / name)]
            self._step(
                f"export-{name}", [*convert, str(export), "--safe-serialization"], mixture=name
            )
            self._step(f"evaluate-{name}", self.evaluate_command(name))
        return self._compare()

    def _compare(self) -> list[dict]:
        """What the command that is shown prints with ``--json``; in this process, to import torch once."""
        from gmai_xtuner.core.errors import EvaluationError
        from gmai_xtuner.evaluate.compare import as_json, compare_runs

        folders = [self.work_dir / "evaluation" / name for name in RUNS]
        quickstart.show(["python", "-m", "gmai_xtuner.evaluate", "compare", *map(str, folders)])
        try:
            found = as_json(compare_runs(*folders))
        except EvaluationError as error:
            raise StepError(f"compare: {error}") from error
        text = json.dumps(found, indent=2) + "\n"
        (self.work_dir / "comparison.json").write_text(text, encoding="utf-8")
        return found

    def train_command(self, name: str) -> list[str]:
        """The command that trains one of the two runs."""
        length: dict[str, object] = {"train_cfg.max_epochs": self.epochs}
        if self.iterations is not None:
            length = {"train_cfg.max_epochs": None, "train_cfg.max_iters": self.iterations}
        return [
            "xtuner",
            "train",
            f"configs/gmai_vl/{CONFIG}.py",
            "--deepspeed",
            "zero2",
            "--work-dir",
            str(self.work_dir / name),
            "--cfg-options",
            *(f"{key}={value}" for key, value in {**OPTIONS, **length}.items()),
        ]

    def evaluate_command(self, name: str) -> list[str]:
        """The command that asks one of the two models the held-out questions."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return [
            "python",
            "-m",
            "gmai_xtuner.evaluate",
            str(self.work_dir / "export" / name),
            *SLAKE,
            "--data",
            str(self.work_dir / "data" / "benchmark"),
            "--out",
            str(self.work_dir / "evaluation" / name),
            "--name",
            f"{name} the generated corpus",
            "--max-new-tokens",
            "64",
            "--max-unread",
            "1",
            *limit,
        ]

    def _claim(self) -> None:
        """Nothing is removed from a folder that isn't an ablation's."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if any(self.work_dir.iterdir()) and not (self.work_dir / MARK).is_file():
            raise StepError(
                f"{self.work_dir} is not empty and not an ablation's; choose a new --work-dir"
            )
        (self.work_dir / MARK).touch()

    def _step(self, name: str, command: Sequence[str], *, mixture: str = "with") -> None:
        environment = quickstart.child_environment(self.work_dir)
        environment["GMAI_MIXTURE"] = str(self.work_dir / "data" / f"{mixture}.yaml")
        log = self.work_dir / f"{name}.log"
        try:
            quickstart.run_command(command, log, environment=environment)
            # xtuner ends with 0 whatever happens; what a conversion writes is put in place at once.
            if name in RUNS and stored_status(self.work_dir / name).get("state") != "finished":
                raise StepError("the training did not finish")
            if name.startswith("export-") and not (Path(command[5]) / "config.json").is_file():
                raise StepError("the conversion wrote nothing")
        except StepError as error:
            raise StepError(f"{name}: {error}{quickstart.log_tail(log)}") from error


def as_text(comparison: dict) -> str:
    """The comparison as a sentence."""
    interval = comparison["interval"]
    told = f" ({100 * interval['low']:+.1f} to {100 * interval['high']:+.1f})" if interval else ""
    return (
        f"with minus without the generated corpus: {100 * comparison['difference']:+.1f} points{told} "
        f"of {comparison['n']} held-out questions, p = {comparison['p_value']:.2g}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="With and without the generated corpus, tiny.")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/ablation"))
    parser.add_argument(
        "--iterations", type=int, help="micro-batches of each run, instead of epochs"
    )
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--public", type=int, default=80)
    parser.add_argument("--questions", type=int, default=48, help="held out, 16 x n")
    parser.add_argument("--limit", type=int, help="questions asked")
    options = parser.parse_args(arguments)
    work_dir = options.work_dir.resolve()
    os.chdir(ROOT)
    if work_dir.is_relative_to(ROOT):
        work_dir = work_dir.relative_to(ROOT)
    data = [f"--{name}={getattr(options, name)}" for name in ("pictures", "public", "questions")]
    try:
        found = Ablation(
            work_dir,
            iterations=options.iterations,
            epochs=options.epochs,
            data=data,
            limit=options.limit,
        ).run()
    except StepError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    for comparison in found:
        print(as_text(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())

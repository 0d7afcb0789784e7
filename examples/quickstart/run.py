# SPDX-License-Identifier: Apache-2.0

"""The quickstart: tiny bases, real images, three stages, conversion, held-out questions.

    python examples/quickstart/run.py --work-dir work_dirs/quickstart

Runs the very command that trains the 7B, ``gmai-train all``. Stopped or killed, the same command goes on.
What a run of minutes on two CPU cores needs otherwise (batch, learning rates) is in `OVERRIDES`: the tiny
bases start from random weights, so stage 3 trains with a far higher learning rate than Table 8's 1e-5, which
is meant for a language model that can already speak.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from report import STAGES, ReportError, write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ACCURACY_NEEDED = 0.8
LOG_TAIL = 40  # lines of a log that an error shows

# Settings of the stage configs; "all" holds for each stage. Four short packs and not a long one:
# packing puts conversations of equal length together, here those with the same question and answer.
OVERRIDES: dict[str, dict[str, object]] = {
    "all": {
        "model.use_activation_checkpointing": False,
        "train_dataloader.batch_size": 4,
        "train_dataloader.num_workers": 1,
        "train_dataloader.dataset.max_length": 320,
        "train_dataloader.dataset.held_out": 0.02,  # a thousandth of this corpus is nothing
        "train_cfg.val_interval": 100,
        "default_hooks.sample_answer.interval": 100,
        "default_hooks.checkpoint.interval": 500,
        "optim_wrapper.accumulative_counts": 1,
        "default_hooks.logger.interval": 5,
        "default_hooks.checkpoint.max_keep_ckpts": 1,
    },
    "stage1": {"optim_wrapper.optimizer.lr": 1e-2, "train_cfg.max_epochs": 0.5},
    "stage2": {"optim_wrapper.optimizer.lr": 3e-3, "train_cfg.max_epochs": 0.5},
    "stage3": {"optim_wrapper.optimizer.lr": 1e-3, "train_cfg.max_epochs": 3},
}
MARK = ".quickstart"


class StepError(RuntimeError):
    """A command of the quickstart did not do what it should have done."""


def child_environment(work_dir: Path) -> dict[str, str]:
    """Environment of the commands: the bases and data to use, and nothing from a hub.

    xtuner starts ``python`` from PATH, so this interpreter's folder goes first.
    """
    folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": folder + os.pathsep + os.environ.get("PATH", ""),
        "GMAI_LLM": str(work_dir / "bases" / "llm"),
        "GMAI_VISION": str(work_dir / "bases" / "vision"),
        "GMAI_MIXTURE": str(work_dir / "corpus" / "mixture.yaml"),
        "GMAI_CACHE": str(work_dir / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def train_command(work_dir: Path) -> list[str]:
    """The command that trains the three stages and converts; a stage's own settings begin with its name."""
    settings = [
        f"{'' if stage == 'all' else stage + '.'}{key}={value}"
        for stage, options in OVERRIDES.items()
        for key, value in options.items()
    ]
    program = ["python", "-m", "gmai_xtuner.train"]
    return [*program, "all", "--work-dir", str(work_dir), *settings]


def claim(work_dir: Path) -> None:
    """Mark a new or empty folder as ours; only in a folder so marked is anything written.

    Raises:
        StepError: the folder has something in it and no mark.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    if any(work_dir.iterdir()) and not (work_dir / MARK).is_file():
        raise StepError(f"{work_dir} is not empty and not a quickstart's; choose a new --work-dir")
    (work_dir / MARK).touch()


def show(command: Sequence[str]) -> None:
    print("\n$ " + shlex.join(command), flush=True)


def run_command(command: Sequence[str], log: Path, *, environment: Mapping[str, str]) -> None:
    """Run a command in the repository's root; its output goes to ``log``, a training's progress is shown.

    Raises:
        StepError: it cannot be started, or ends with an error. xtuner ends with 0 whatever happens:
            look at the outcome as well.
    """
    show(command)
    executable = shutil.which(command[0], path=environment["PATH"])
    if executable is None:
        raise StepError(f"{command[0]} is not installed beside {sys.executable}: run `make env`")
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [executable, *command[1:]],
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if "Iter(train)" in line or "Iter(val)" in line:
                print("  " + line[line.index("Iter(") :].rstrip(), flush=True)
    if process.returncode:
        raise StepError(f"ended with code {process.returncode}")


def log_tail(log: Path) -> str:
    """The end of a log, for an error message."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    return "\n".join(["", f"--- the end of {log}", *lines])


def ask_heldout(work_dir: Path) -> None:
    """Ask the converted model every held-out question; write ``predictions.jsonl``."""
    from gmai_xtuner.loading import load_model

    predictor = load_model(work_dir / "model")
    corpus = work_dir / "corpus"
    lines = []
    for line in (corpus / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = record["conversations"][0]["value"].replace("<image>\n", "")
        image = corpus / "images" / record["image"]
        answered = {
            "id": record["id"],
            "image": record["image"],
            "question": question,
            "answer": record["conversations"][1]["value"],
            "prediction": predictor.answer(question, [str(image)], max_new_tokens=32),
        }
        lines.append(json.dumps(answered, ensure_ascii=False) + "\n")
    (work_dir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def run_step(name: str, command: Sequence[str], work_dir: Path) -> None:
    """Run one command, with the end of its log in the error."""
    log = work_dir / f"{name}.log"
    try:
        run_command(command, log, environment=child_environment(work_dir))
    except StepError as error:
        raise StepError(f"{name}: {error}{log_tail(log)}") from error


def write_corpus(work_dir: Path) -> None:
    """Write the corpus, unless an earlier run wrote all of it."""
    corpus = work_dir / "corpus"
    if (corpus / "mixture.yaml").is_file():  # its last file
        return
    if corpus.exists():
        shutil.rmtree(corpus)
    run_step("corpus", ["python", "examples/quickstart/corpus.py", str(corpus)], work_dir)


def run(work_dir: Path) -> dict:
    """All steps; returns the report.

    Raises:
        StepError: one of them did not finish.
    """
    from gmai_xtuner.train.status import stored_status

    claim(work_dir)
    run_step("bases", ["python", "-m", "gmai_xtuner.tiny_bases", str(work_dir / "bases")], work_dir)
    write_corpus(work_dir)
    command = train_command(work_dir)
    show(command)
    # Its output is left alone: in a terminal it draws a bar.
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=child_environment(work_dir))
    if done.returncode:
        raise StepError(f"gmai-train ended with code {done.returncode}")
    print(f"\nasking {work_dir / 'model'} the held-out questions", flush=True)
    ask_heldout(work_dir)
    timings = {}
    for folder in STAGES.values():
        status = stored_status(work_dir / folder)
        begun, ended = (datetime.fromisoformat(status[key]) for key in ("since", "time"))
        timings[folder] = (ended - begun).total_seconds()
    (work_dir / "timings.json").write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")
    return write_report(work_dir)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GMAI-VL's three stages in minutes on a CPU.")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/quickstart"))
    options = parser.parse_args(arguments)
    work_dir = options.work_dir.resolve()
    os.chdir(ROOT)  # where the commands run; the paths that they show are short
    if work_dir.is_relative_to(ROOT):
        work_dir = work_dir.relative_to(ROOT)
    try:
        report = run(work_dir)
    except (StepError, ReportError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    if report["heldout_accuracy"] < ACCURACY_NEEDED:
        print(
            f"\nerror: held-out accuracy {report['heldout_accuracy']:.2f} is below "
            f"{ACCURACY_NEEDED}: the model did not learn; compare the losses above",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

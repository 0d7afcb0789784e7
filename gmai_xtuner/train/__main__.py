# SPDX-License-Identifier: Apache-2.0

"""``gmai-train STAGE [KEY=VALUE ...]``: a stage, or ``all`` from the bases to a model that answers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmai_xtuner.cli import positive_int
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.train.launch import FAILED, STOPPED, Launch, start_xtuner
from gmai_xtuner.train.names import packaged_names
from gmai_xtuner.train.status import stored_status

PAPER = ("stage1_shallow", "stage2_deep", "stage3_instruct")
VARIANTS = {
    "paper": PAPER,
    "small_data": PAPER,
    "one_80gb": ("stage1_one_80gb", "stage2_one_80gb", "stage3_lora_one_80gb"),
    "one_24gb": ("stage1_one_24gb", "stage2_one_24gb", "stage3_qlora_one_24gb"),
}
_BEGUN_WITH = ("GMAI_LLM", "GMAI_VISION", "GMAI_MIXTURE")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0 if everything has finished."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        wrong = [text for text in options.settings if "=" not in text]
        if wrong:
            raise GMAIError(
                f"settings are KEY=VALUE, as --cfg-options of xtuner takes them; got {wrong}"
            )
        if options.stage == "all":
            return train_all(options)
        config = _config(options.stage)
        work_dir = options.work_dir or Path("work_dirs", config.stem)
        return _launch(config.stem, config, work_dir, options.settings, options)
    except (GMAIError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # while no training runs
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="gmai-train",
        description="Train by `xtuner train`, show one screen of it, and exit with 0 only if it finished: 1 "
        "failed, 3 stopped by a file `stop`, 130 by Ctrl-C, 143 by SIGTERM.",
    )
    add = parser.add_argument
    text = "stage1_shallow, stage2_deep, ..., or a config file; or all"
    add("stage", metavar="STAGE|all", help=text)
    text = "overrides of the config (--cfg-options); of `all`, stage1.KEY=VALUE is for one stage"
    add("settings", nargs="*", metavar="KEY=VALUE", help=text)
    add("--work-dir", type=Path, help="default work_dirs/STAGE; of `all`, the folder of everything")
    add("--deepspeed", default="zero2", metavar="NAME", help="default zero2")
    text = "go on from the newest checkpoint (`all` always does)"
    add("--resume", action="store_true", help=text)
    add("--nproc", type=positive_int, metavar="N", help="GPUs of this machine (default 1)")
    add("--seed", type=int)
    group = parser.add_argument_group("all: three stages, a converted model, an evaluation")
    group.add_argument("--variant", choices=VARIANTS, default="paper", help="which configs")
    text = "folder of benchmarks that the model is asked at the end (docs/benchmarks.md)"
    group.add_argument("--benchmarks", type=Path, metavar="DIR", help=text)
    return parser


def _config(name: str) -> Path:
    """Return the file of a config; refuse an unknown name."""
    names = packaged_names()
    found = Path(name if Path(name).is_file() else names.get(name, ""))
    if found.suffix != ".py":
        known = sorted(n for n, file in names.items() if file.endswith(".py") and "/" not in n)
        raise GMAIError(f"there is no config {name!r}. Give a file, or one of {', '.join(known)}")
    return found


def _launch(
    title: str,
    config: Path,
    work_dir: Path,
    settings: Sequence[str],
    options: argparse.Namespace,
    **environment: str,
) -> int:
    arguments = [str(config), "--work-dir", str(work_dir), "--deepspeed", options.deepspeed]
    if options.resume:
        arguments += ["--resume", str(work_dir)]
    if options.seed is not None:
        arguments += ["--seed", str(options.seed)]
    if settings:
        arguments += ["--cfg-options", *settings]
    if options.nproc:
        environment["NPROC_PER_NODE"] = str(options.nproc)
    return Launch(title, arguments, work_dir, environment).run()


# --- everything ---------------------------------------------------------------------------------


def train_all(options: argparse.Namespace) -> int:
    """Train three stages, convert and evaluate; what is there already is not made again.

    Returns the exit status of the step that did not finish, 0 if all did. A folder that was begun with other
    settings, or a conversion that left no model, is a ``GMAIError``.
    """
    folder = options.work_dir or Path("work_dirs", "gmai_vl")
    folder.mkdir(parents=True, exist_ok=True)
    options.resume = True
    dirs = [folder / name for name in ("stage1", "stage2", "stage3")]
    environment = {"GMAI_STAGE1": str(dirs[0]), "GMAI_STAGE2": str(dirs[1])}
    begun_with: dict[str, Any] = {name: os.environ.get(name) for name in _BEGUN_WITH}
    begun_with |= {"variant": options.variant, "deepspeed": options.deepspeed, "seed": options.seed}
    for name, work_dir in zip(VARIANTS[options.variant], dirs, strict=True):
        config = _config("small_data" if options.variant == "small_data" else name)
        environment["GMAI_STAGE"] = name
        begun_with["settings"] = _settings_of(work_dir.name, options.settings)
        _check_begun_alike(work_dir, begun_with, begun=(work_dir / "last_checkpoint").is_file())
        if stored_status(work_dir).get("state") == "finished":
            print(f"{name}: has finished", flush=True)
        else:
            print(f"{name}: {work_dir}", flush=True)
            settings = begun_with["settings"]
            status = _launch(name, config, work_dir, settings, options, **environment)
            if status:
                return status
        begun_with["trained"] = stored_status(work_dir)["time"]
    model = folder / "model"
    _check_begun_alike(model, begun_with, begun=model.is_dir())
    _convert(config, dirs[-1], model, environment, begun_with["settings"])
    return _evaluate(model, folder / "evaluation", options.benchmarks)


def _settings_of(stage: str, settings: Sequence[str]) -> list[str]:
    """Return the settings of one stage: those for all, then its own, which win."""
    shared = [text for text in settings if not text.startswith(("stage1.", "stage2.", "stage3."))]
    own = [text.removeprefix(f"{stage}.") for text in settings if text.startswith(f"{stage}.")]
    return [*shared, *own]


def _check_begun_alike(step: Path, now: Mapping[str, Any], *, begun: bool) -> None:
    """Keep what a step of ``all`` is begun with, beside its folder; refuse to go on with anything else."""
    record = step.with_suffix(".json")
    before = json.loads(record.read_text(encoding="utf-8")) if begun and record.is_file() else now
    changed = [
        f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]
    ]
    if changed:
        raise GMAIError(
            f"{step} was begun with other settings ({'; '.join(changed)}). Give the same command to go on, "
            f"remove {step} to make it anew, or give another --work-dir"
        )
    replace_text(record, json.dumps(now, indent=2) + "\n")


def _convert(
    config: Path, stage: Path, model: Path, environment: Mapping[str, str], settings: Sequence[str]
) -> None:
    """Write the model of the last stage; an export is put in place at once, so that one there is whole."""
    if (model / "config.json").is_file():
        print(f"converted: {model}", flush=True)
        return
    arguments = ["convert", "pth_to_hf", str(config), str(stage), str(model)]
    arguments += ["--save-format", "huggingface"]
    if "qlora" in config.stem:
        settings = [*settings, "model.llm.quantization_config=None"]
    if settings:
        arguments += ["--cfg-options", *settings]
    print(f"converting to {model}", flush=True)
    log = model.with_name("convert.log")
    with log.open("w", encoding="utf-8") as file:
        start_xtuner(arguments, environment, stdout=file).wait()
    if not (model / "config.json").is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last_words = (
            [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["nothing"]
        )
        raise GMAIError(
            f"{model} could not be written: {last_words[-1].removeprefix('error: ')} ({log})"
        )


def _evaluate(model: Path, out: Path, benchmarks: Path | None) -> int:
    """Ask the benchmarks; what was answered before is not asked again."""
    print(f"to ask it: gmai-chat {model} --image IMAGE", flush=True)
    if benchmarks is None:
        return 0
    program = [sys.executable, "-m", "gmai_xtuner.evaluate", str(model), "--benchmark", "all"]
    ended = subprocess.run([*program, "--data", str(benchmarks), "--out", str(out)], check=False)
    # Its 3, too many answers that are none, would be taken for a run that was stopped.
    return FAILED if ended.returncode == STOPPED else ended.returncode


if __name__ == "__main__":
    sys.exit(main())

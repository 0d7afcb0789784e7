# SPDX-License-Identifier: Apache-2.0

"""Disk full, read-only folder, kill -9, a clock set back and two writers -> what is lost, and how it is said.

Each injection is a process of its own that builds a small corpus, stores answers of an evaluation, exports
weights, trains a tiny model or converts it, into a small file system in memory (Linux, as root). Afterwards
the same command runs without the fault, and its files must be those of a run that was never disturbed; of a
training, the weights that its last checkpoint holds.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from printing import REPOSITORY, parser, show

WITH_TIME = ("summary.json", "report.html", "README.md")
"""Files that say when, and are not compared."""


def corpus(folder: Path) -> int:
    """Build a corpus of eight images."""
    from data_tools import generate

    data = folder.parent / "data"
    if not data.is_dir():
        for number in range(8):
            (data / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 20 + number).save(
                data / "ab"[number % 2] / f"{number}.png"
            )
        job = {"output": "unused", "workers": 1, "sources": [{
            "name": "s", "reader": "image_folder", "root": str(data), "licence": "MIT", "modality": "CT",
            "department": "None", "labels": {"a": "cyst", "b": "nodule"}}]}  # fmt: skip
        (folder.parent / "job.yaml").write_text(json.dumps(job))
    return generate.main([str(folder.parent / "job.yaml"), "--output", str(folder / "corpus")])


def evaluation(folder: Path) -> int:
    """Store two hundred answers, those that are there already not again."""
    from gmai_xtuner.evaluate.store import Answer, AnswerStore, Identity

    store = AnswerStore(folder / "answers", Identity("b", "v", "m", "n", {}))
    with store.locked():
        store.create()
        known = {answer.id for answer in store.read().values()}
        with store.writer() as add:
            for number in range(200):
                if str(number) not in known:
                    text = f"answer {number} " * 40
                    generation = {"max_new_tokens": 8}
                    add([Answer(str(number), "p", text, 1.0, "m", "p/1", generation)])
                    time.sleep(0.001)
    return 0


def export(folder: Path) -> int:
    """Export four files of weights."""
    import torch
    from safetensors.torch import save_file

    from gmai_xtuner.checkpoint.export import new_folder

    if (folder / "model").is_dir():
        return 0
    with new_folder(folder / "model") as made:
        for number in range(4):
            save_file({"w": torch.full((20_000,), float(number))}, made / f"{number}.safetensors")
            time.sleep(0.02)
    return 0


PREPARED = Path(tempfile.gettempdir(), f"faults-{os.getpid()}")
"""Tiny bases, a corpus and a trained stage, made once."""
LATE = "import os, time\nnow = time.time\ntime.time = lambda: now() - float(os.environ['SECONDS_LATE'])\n"
TRAINING = ["--deepspeed", "zero2", "--resume", "train_dataloader.num_workers=0",
            "train_dataloader.batch_size=2", "train_dataloader.dataset.max_length=160",
            "train_cfg.max_epochs=None", "train_cfg.max_iters=12",
            "train_dataloader.dataset.held_out=0", "default_hooks.checkpoint.interval=4",
            "default_hooks.sample_answer.interval=0", "optim_wrapper.accumulative_counts=1"]  # fmt: skip


def program(*command: str | Path) -> int:
    """Run a command of the project as users do, with the clock of this process."""
    late = getattr(time.time, "seconds_late", 0.0)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PREPARED / "late")] * bool(late) + [str(REPOSITORY)]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SECONDS_LATE": str(late),
        "GMAI_LLM": str(PREPARED / "llm"),
        "GMAI_VISION": str(PREPARED / "vision"),
        "GMAI_MIXTURE": str(PREPARED / "corpus" / "mixture.yaml"),
        "GMAI_CACHE": str(PREPARED / "cache"),
    }
    # Its own lines are no part of the result.
    return subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, env=environment, stdout=sys.stderr.fileno()
    ).returncode


def training(folder: Path) -> int:
    """Train the projector for twelve steps, with three checkpoints."""
    command = [sys.executable, "-m", "gmai_xtuner.train", "stage1_shallow"]
    return program(*command, "--work-dir", folder / "run", *TRAINING)


def conversion(folder: Path) -> int:
    """Convert what :func:`training` has made; ``xtuner`` exits with 0, and the model tells."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        config = "configs/gmai_vl/stage1_shallow.py"
        command = ["xtuner", "convert", "pth_to_hf", config, PREPARED / "run", model]
        program(*command, "--save-format", "huggingface")
    return int(not (model / "config.json").is_file())


def prepare() -> None:
    from examples.tiny_bases import write_tiny_bases
    from tests.toy import record, write_corpus

    names = [f"{number}.png" for number in range(8)]
    records = [record(name, "<image>\nWhich?", name, image=name) for name in names]
    write_corpus(PREPARED / "corpus", {"toy": records}, images=names)
    write_tiny_bases(PREPARED)
    (PREPARED / "late").mkdir()
    (PREPARED / "late" / "sitecustomize.py").write_text(LATE)
    if training(PREPARED):
        raise SystemExit("training fails undisturbed")


COMMANDS: dict[str, Callable[[Path], int]] = {
    "corpus": corpus,
    "evaluation": evaluation,
    "export": export,
    "training": training,
    "conversion": conversion,
}


def forked(command: Callable[[Path], int], folder: Path, *, ago: float = 0.0) -> tuple[int, Path]:
    """Start a command in a copy of this process, whose clock is ``ago`` s late; its id and stderr."""
    said = Path(tempfile.mkstemp(suffix=".stderr")[1])
    process = os.fork()
    if process:
        return process, said
    status = 70
    try:
        out = os.open(said, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if ago:
            now = time.time
            time.time = lambda: now() - ago
            time.time.seconds_late = ago  # type: ignore[attr-defined]
        status = _said(command, folder)
    finally:
        os._exit(status)


def _said(command: Callable[[Path], int], folder: Path) -> int:
    """As the commands do: errors of the project and of the file system in one message."""
    from gmai_xtuner.core.errors import GMAIError

    try:
        return command(folder)
    except (GMAIError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 70


def ended(process: int, said: Path) -> tuple[int, str]:
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = said.read_text(errors="replace")
    said.unlink()
    return status, text


def descendants(process: int) -> list[int]:
    """Return a process and everything that it has started, in whatever group or session it is."""
    found = [process]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def settle(seconds: float = 120) -> None:
    """Wait until nothing runs that a command has left behind, which this process has inherited."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while True:
            if time.monotonic() > end:
                for one in descendants(os.getpid())[1:]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)


def content(folder: Path) -> dict[str, str]:
    """Hash of each file that a user has; answers in any order; of a training, of each weight at its end."""
    found = {}
    if (folder / "run").is_dir():
        from gmai_xtuner.checkpoint.training import load_checkpoint_state

        newest = Path((folder / "run" / "last_checkpoint").read_text())
        weights = load_checkpoint_state(newest)
        return {newest.name: ""} | {
            name: hashlib.sha256(value.detach().float().numpy().tobytes()).hexdigest()
            for name, value in weights.items()
        }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name not in WITH_TIME:
            lines = sorted(path.read_bytes().splitlines())
            found[name] = hashlib.sha256(b"\n".join(lines)).hexdigest()
    return found


@contextlib.contextmanager
def file_system(size: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "disk"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=False)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


LARGE = 512 * 1024
SPACE: dict[Callable[[Path], int], int] = {}
"""KiB that an undisturbed run of a command leaves on the disk."""


def disk_full(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    remount(folder, f"size={max(4, int(SPACE[command] * rng.uniform(0.02, 1)))}k")
    outcome = ended(*forked(command, folder))
    remount(folder, f"size={LARGE}k")
    return outcome


def read_only(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    if rng.random() < 0.5:  # in the middle of it
        process, said = forked(command, folder)
        time.sleep(rng.uniform(0, seconds))
        command_line = ["mount", "-o", "remount,ro", folder]
        for _ in range(100):  # as soon as no file is open for writing
            if subprocess.run(command_line, stderr=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.02)
        outcome = ended(process, said)
    else:
        remount(folder, "ro")
        outcome = ended(*forked(command, folder))
    remount(folder, "rw")
    return outcome


def killed(command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float) -> Any:
    process, said = forked(command, folder)
    time.sleep(rng.uniform(0, seconds))
    from gmai_xtuner.train.status import stored_status

    trainer = stored_status(folder / "run").get("process")
    for victim in [trainer] if trainer and rng.random() < 0.5 else descendants(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    outcome = ended(process, said)
    settle()
    return outcome


def clock_back(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    killed(command, folder, rng, seconds)
    return ended(*forked(command, folder, ago=86_400 * rng.uniform(1, 400)))


def two_writers(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    first = forked(command, folder)
    time.sleep(rng.uniform(0, seconds / 2))
    second = forked(command, folder)
    one, other = ended(*first), ended(*second)
    return one if one[0] else other


FAULTS = {
    "disk full": disk_full,
    "read-only": read_only,
    "kill -9": killed,
    "clock set back": clock_back,
    "two writers": two_writers,
}


def inject(
    command: str, fault: str, whole: dict[str, str], seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Disturb a run, let it go on, and compare."""
    with file_system(LARGE) as folder:
        status, text = FAULTS[fault](COMMANDS[command], folder, rng, seconds)
        settle()
        again, said = ended(*forked(COMMANDS[command], folder))
        same = content(folder) == whole
    last = text.strip().splitlines()[-1:] if status > 0 else []
    return {
        "status": status,
        "traceback": "Traceback" in text or "Traceback" in said,
        "lost": again != 0 or not same,
        "said": last[0].replace(str(folder), "FOLDER") if last else "",
        "then": said.strip()[-300:] if again or not same else "",
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tries", type=int, default=8, help="of each command and fault")
    options.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = options.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    from data_tools import overview, pipeline  # noqa: F401 - once, before the copies are made

    rng, rows = random.Random(args.seed), []
    # Orphans become children of this process, which can wait for them: PR_SET_CHILD_SUBREAPER.
    ctypes.CDLL(None).prctl(36, 1)
    if {"training", "conversion"} & set(args.only):
        prepare()
    for command in args.only:
        with file_system(LARGE) as folder:
            began = time.monotonic()
            status, text = ended(*forked(COMMANDS[command], folder))
            seconds = time.monotonic() - began
            if status:
                raise SystemExit(f"{command} fails undisturbed: {text}")
            whole = content(folder)
            SPACE[COMMANDS[command]] = shutil.disk_usage(folder).used // 1024
        for fault in FAULTS:
            found = [inject(command, fault, whole, seconds, rng) for _ in range(args.tries)]
            counted = collections.Counter(one["said"] for one in found if one["said"])
            rows.append(
                {
                    "command": command,
                    "fault": fault,
                    "tries": len(found),
                    "disturbed": sum(one["status"] != 0 for one in found),
                    "lost": sum(one["lost"] for one in found),
                    "tracebacks": sum(one["traceback"] for one in found),
                    "said": counted.most_common(1)[0][0][:160] if counted else "",
                }
            )
            for one in found:
                if one["lost"] or one["traceback"]:
                    print(command, fault, one, file=sys.stderr)
    shutil.rmtree(PREPARED, ignore_errors=True)
    show({"injections": sum(row["tries"] for row in rows), "rows": rows}, as_json=args.json)


if __name__ == "__main__":
    shutil.which("mount") or sys.exit("this needs Linux and root")
    main()

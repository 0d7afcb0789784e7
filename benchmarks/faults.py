# SPDX-License-Identifier: Apache-2.0

"""Disk full, read-only folder, kill -9, a clock set back and two writers -> what is lost, and how it is said.

Each injection is a process of its own that builds a small corpus, stores answers of an evaluation, or exports
weights, into a small file system in memory (Linux, as root). Afterwards the same command runs without the
fault, and its files must be those of a run that was never disturbed.
"""

from __future__ import annotations

import collections
import contextlib
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


COMMANDS: dict[str, Callable[[Path], int]] = {
    "corpus": corpus,
    "evaluation": evaluation,
    "export": export,
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


def content(folder: Path) -> dict[str, str]:
    """Hash of each file that a user has; answers in any order."""
    found = {}
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


LARGE = 64 * 1024


def disk_full(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    remount(folder, f"size={rng.choice((4, 8, 16, 32, 48, 64, 96, 128, 192, 256))}k")
    outcome = ended(*forked(command, folder))
    remount(folder, f"size={LARGE}k")
    return outcome


def read_only(
    command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float
) -> Any:
    if rng.random() < 0.5:  # in the middle of it
        process, said = forked(command, folder)
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(subprocess.CalledProcessError):  # a file is open for writing
            remount(folder, "ro")
        outcome = ended(process, said)
    else:
        remount(folder, "ro")
        outcome = ended(*forked(command, folder))
    remount(folder, "rw")
    return outcome


def killed(command: Callable[[Path], int], folder: Path, rng: random.Random, seconds: float) -> Any:
    process, said = forked(command, folder)
    time.sleep(rng.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return ended(process, said)


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
    args = options.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    from data_tools import overview, pipeline  # noqa: F401 - once, before the copies are made

    rng, rows = random.Random(args.seed), []
    for command in COMMANDS:
        with file_system(LARGE) as folder:
            began = time.monotonic()
            status, text = ended(*forked(COMMANDS[command], folder))
            seconds = time.monotonic() - began
            if status:
                raise SystemExit(f"{command} fails undisturbed: {text}")
            whole = content(folder)
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
    show({"injections": sum(row["tries"] for row in rows), "rows": rows}, as_json=args.json)


if __name__ == "__main__":
    shutil.which("mount") or sys.exit("this needs Linux and root")
    main()

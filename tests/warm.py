# SPDX-License-Identifier: Apache-2.0

"""Commands in forks of a process that has imported torch, DeepSpeed and xtuner once: saves ten seconds each.

:func:`run` takes what ``subprocess.run`` takes. A fork is like a fresh interpreter: its ``__main__`` is the
file that runs, its environment what was given, and none of the package's workarounds are installed in the
parent. ``xtuner`` runs its own entry point; in place of ``torchrun``, each rank is a fork, and when one fails
the others get ``SIGTERM``. Tests of the process itself start a real one.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# What xtuner's commands load. Not `gmai_xtuner.plugin`: it looks at the command that imports it.
PRELOADED = (
    "deepspeed", "liger_kernel.transformers", "mmengine.runner", "peft", "torch.utils.tensorboard",
    "torchvision", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip", "xtuner.entry_point", "xtuner.tools.train",
)  # fmt: skip


def run(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    folder: str | Path | None = None,
    stdin: str = "",
    merged: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``xtuner``, ``torchrun``, ``python FILE`` or ``python -m MODULE`` in a fork, without a shell.

    Args:
        command: with its arguments.
        environment: all variables.
        folder: working directory; default: this process's.
        stdin: what it reads.
        merged: standard error goes into standard output.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = {name: str(Path(directory, name)) for name in ("in", "out", "err")}
        Path(files["in"]).write_text(stdin)
        request = {
            "command": [*map(str, command)],
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
            "files": {**files, "err": files["out"] if merged else files["err"]},
            "timeout": timeout,
        }
        status = _parent(request)
        read = [Path(files[name]) for name in ("out", "err")]
        out, err = (path.read_text() if path.exists() else "" for path in read)
    return subprocess.CompletedProcess(request["command"], status, out, err)


def _parent(request: dict[str, Any], kept: list[subprocess.Popen[str]] = []) -> int:  # noqa: B006
    """Hand a request to this process's parent of forks, which the first starts."""
    if not kept:
        environment = {key: value for key, value in os.environ.items() if "GMAI" not in key}
        kept.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.warm"], cwd=Path(__file__).parents[1],
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    process = kept[0]
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    return int(process.stdout.readline())


def main() -> None:
    """Answer each request, a line of standard input, with its exit status, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        process = _fork(lambda request=request: _serve(request))
        deadline = time.monotonic() + request["timeout"]
        while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
            time.sleep(0.02)
        print(os.waitstatus_to_exitcode(ended[1]), file=answers, flush=True)


def _fork(work: Callable[[], int]) -> int:
    """Run ``work`` in a fork, which ends like an interpreter with the status that it returns."""
    if process := os.fork():
        return process
    status = 1
    try:
        status = work()
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(request: dict[str, Any]) -> int:
    import numpy as np

    os.setsid()
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(request["files"][name], flags), number)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [request["folder"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    np.random.seed()
    program, *arguments = request["command"]
    if program == "torchrun":
        return _torchrun(arguments)
    if Path(program).name != "xtuner":
        return _python(arguments)
    from xtuner import entry_point

    entry_point.subprocess = ModuleType("subprocess")
    entry_point.subprocess.run = _started_by_xtuner
    sys.argv = ["xtuner", *arguments]
    entry_point.cli()
    return 0


def _started_by_xtuner(command: list[str]) -> None:
    program, *arguments = command
    if program == "python":
        os.waitpid(_fork(lambda: _python(arguments)), 0)
    else:
        _torchrun(arguments)


def _torchrun(arguments: list[str]) -> int:
    """Run the ranks as forks; the last status that is not 0."""
    (ranks,) = (int(part[17:]) for part in arguments if part.startswith("--nproc_per_node="))
    starts = (part.endswith(".py") or part == "-m" for part in arguments)
    script, ended = arguments[[*starts].index(True) :], 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_fork(lambda rank=rank: _rank(script, rank, ranks, port)) for rank in range(ranks)]
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status:
            ended = os.waitstatus_to_exitcode(status)
            for other in processes:
                os.kill(other, signal.SIGTERM)
    return ended


def _rank(script: list[str], rank: int, ranks: int, port: int) -> int:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    return _python(script)


def _python(arguments: list[str]) -> int:
    """Run as ``python ARGUMENTS`` does."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            main = ModuleType("__main__")
            main.__file__ = arguments[0]
            sys.modules["__main__"], sys.argv = main, arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), main.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    main()

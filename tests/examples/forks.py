# SPDX-License-Identifier: Apache-2.0

"""Examples as the tests run them: scripts under names of their own, their commands in forks."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from run import ROOT, StepError

from tests import warm


def load(example: str) -> ModuleType:
    """The ``run.py`` of an example, under a name of its own: each has one."""
    file = ROOT / "examples" / example / "run.py"
    specification = importlib.util.spec_from_file_location(f"{example}_run", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def in_a_fork(command: Sequence[str], log: Path, *, environment: Mapping[str, str]) -> None:
    """The quickstart's ``run_command``."""
    if command[1] == "-c":
        script = log.with_suffix(".py")
        script.write_text(command[2])
        command = [command[0], str(script), *command[3:]]
    done = warm.run(command, environment=environment, folder=ROOT, merged=True)
    log.write_text(done.stdout)
    if done.returncode:
        raise StepError(f"ended with code {done.returncode}")

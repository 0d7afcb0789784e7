# SPDX-License-Identifier: Apache-2.0

"""The rule of arrows: which package may import which, imports inside of functions counted.

Imports for type checking alone load nothing and are not counted.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "mmengine", "transformers", "deepspeed", "xtuner")

_MODEL = ("core", "data", "model", "checkpoint")
_COMMAND = (*_MODEL, "generate", "inference_queue", "loading", "plugin", "cli")
ALLOWED = {
    "core": (),
    "data": ("core",),
    "model": ("core", "data"),
    "checkpoint": ("core", "data", "model"),
    "generate": _MODEL,
    "evaluate": _COMMAND,
    "train": (*_MODEL, "generate", "evaluate", "cli"),
    "preflight": (*_COMMAND, "train", "evaluate"),
    "chat": _COMMAND,
    "serve": _COMMAND,
    "demo": _COMMAND,
    "compat": (*_MODEL, "train"),
}
"""Package of ``gmai_xtuner`` -> what of ``gmai_xtuner`` it may import. Other single modules beside the
packages (commands, ``plugin``) may import anything."""

VIOLATIONS: set[tuple[str, str]] = set()
"""Imports against the rule that are still to be mended; nothing may be added."""


def modules() -> list[tuple[str, Path]]:
    """Every module of the product by its dotted name."""
    found = []
    for package in ("gmai_xtuner", "data_tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


NAMES = {name for name, _ in modules()}


def imported(name: str, path: Path) -> set[str]:
    """Modules that a module imports anywhere; of ``from a import b`` the module ``a.b`` if there is one."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.level, f"{path}: a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in NAMES else node.module for one in below}
    return found - {name}


def package_of(name: str) -> str:
    """``gmai_xtuner.data.plan`` -> ``data``."""
    return name.split(".")[1] if "." in name else ""


IMPORTS = {name: imported(name, path) for name, path in modules()}


def test_arrows_run_down_only():
    against = {
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if name.startswith("gmai_xtuner.") and package_of(name) in ALLOWED
        if other.startswith("gmai_xtuner.")
        if package_of(other) not in (package_of(name), *ALLOWED[package_of(name)])
    }
    assert sorted(against - VIOLATIONS) == [], "imports against the rule"
    gone = {pair for pair in VIOLATIONS if pair[0] not in NAMES}
    assert sorted(VIOLATIONS - against - gone) == [], "mended: take these out of the list"


def test_no_circle_between_packages():
    TopologicalSorter(ALLOWED).prepare()
    graph: defaultdict[str, set[str]] = defaultdict(set)
    folders = {path.name for path in (ROOT / "data_tools").iterdir() if path.is_dir()}
    for name, others in IMPORTS.items():
        for other in others:
            packages = {package_of(name), package_of(other)}
            if name.startswith("data_tools.") and len(packages) == 2 and packages <= folders:
                graph[package_of(name)].add(package_of(other))
    TopologicalSorter(graph).prepare()


def test_the_corpus_builder_and_the_plugin_meet_in_core_alone():
    for name, others in IMPORTS.items():
        wrong = {
            other
            for other in others
            if other.split(".")[0] in ("gmai_xtuner", "data_tools")
            and other.split(".")[0] != name.split(".")[0]
            and not other.startswith("gmai_xtuner.core")
        }
        assert not wrong, (name, wrong)


def test_core_loads_nothing_heavy():
    core = [name for name in NAMES if name.startswith("gmai_xtuner.core")]
    code = (
        f"import sys\nfor name in {sorted(core)}: __import__(name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name in core:
        roots = {one.split(".")[0] for one in IMPORTS[name]}
        assert not roots.intersection(HEAVY), name


COMMANDS = (
    *(
        "chat",
        "serve",
        "demo",
        "preflight",
        "evaluate",
        "train",
        "import_model",
        "llama_base",
        "tiny_bases",
    ),
    *("data_tools.generate", "data_tools.overlap", "data_tools.import_gmai"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    name = command if "." in command else f"gmai_xtuner.{command}"
    code = (
        f"import runpy, sys\nsys.argv = [{name!r}, '--help']\n"
        f"try:\n    runpy.run_module({name!r}, run_name='__main__')\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# --- ``import gmai_xtuner.plugin`` registers, and changes nothing else ---


CODE = """
import os, random, sys
import numpy, torch, PIL.Image, PIL.ImageFile
state = lambda: (
    dict(os.environ), random.getstate(), numpy.random.get_state()[1].tolist(),
    torch.random.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
    PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
)
import xtuner.tools.train, deepspeed  # what xtuner itself changes is not ours
before = state()
import gmai_xtuner.plugin
assert state() == before, "importing changed the environment, a seed or a switch"

from mmengine.registry import DATASETS, DATA_SAMPLERS, FUNCTIONS, HOOKS, LOOPS, MODELS, PARAM_SCHEDULERS
from xtuner.registry import BUILDER, MAP_FUNC
for registry, names in (
    (BUILDER, ("GMAILLaVAModel", "SoftPackedDataset")),
    (MODELS, ("GMAILLaVAModel",)),
    (DATASETS, ("SoftPackedDataset",)),
    (MAP_FUNC, ("soft_packing_map_fn",)),
    (DATA_SAMPLERS, ("PackSampler", "MicroBatchSampler")),
    (FUNCTIONS, ("collate_packs",)),
    (LOOPS, ("PackedTrainLoop",)),
    (HOOKS, ("ProgressHook", "StepCheckpointHook", "OptimizerStepScheduleHook")),
    (PARAM_SCHEDULERS, ("WarmupCosineLR",)),
):
    for name in names:
        assert registry.get(name).__name__ == name, (registry, name)

import logging
from mmengine.logging import MMLogger
log = logging.getLogger("gmai_xtuner.core.files")
log.info("before a run")
MMLogger.get_instance("run", logger_name="run", log_file=sys.argv[1])
import importlib
importlib.reload(gmai_xtuner.plugin)  # a second import must not fail on names that are taken
log.info("Waiting for %s", "a lock")
print("registered")
"""


def test_import_registers_sends_the_log_on_and_does_nothing_else(tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    command = [sys.executable, tmp_path / "code.py", tmp_path / "run.log"]
    done = warm.run(command, environment=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("registered")
    assert "before a run" in done.stdout + done.stderr
    assert (tmp_path / "run.log").read_text().count("INFO - Waiting for a lock") == 1


@pytest.mark.parametrize("package", ["gmai_xtuner", "data_tools"])
def test_no_command_takes_the_beginning_of_an_option_for_the_option(package):
    """``--prompt TEXT`` would be ``--prompt-template``, until an option is added that it also begins."""
    for file in (ROOT / package).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("ArgumentParser(") == text.count("allow_abbrev=False"), file

# SPDX-License-Identifier: Apache-2.0

"""The rule of arrows: which package may import which, imports inside of functions counted.

Imports for type checking alone load nothing and are not counted.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
    *("data_tools.generate", "data_tools.overlap"),
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

# SPDX-License-Identifier: Apache-2.0

"""Names for the configs and DeepSpeed files that come with this package, in every ``xtuner`` command.

xtuner knows the files of its own folder alone (``xtuner.configs.cfgs_name_path``), and has no plugins. Of
what it imports before it looks there, torch has: ``import torch`` calls the entry points of the group
``torch.backends``. Ours, :func:`wait_for_xtuner`, loads nothing; it only waits for ``import xtuner.configs``.
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off: then paths work, and names don't.

From then on ``xtuner train`` also says in ``status.json`` what it fails of before the plugin is imported.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs" / "gmai_vl")
CONFIGS = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
"""The folder of the stage configs: in an installed package its own, otherwise the repository's."""
DEEPSPEED_NAMES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def packaged_names() -> dict[str, str]:
    """Return name -> file of configs and mixtures (each also as ``gmai_vl/NAME``) and DeepSpeed files."""
    files = [
        file for kind in ("*.py", "variants/*.py", "mixtures/*.yaml") for file in CONFIGS.glob(kind)
    ]
    found = {f"{prefix}{file.stem}": str(file) for file in files for prefix in ("", "gmai_vl/")}
    deepspeed = _PACKAGE / "train" / "deepspeed"
    return {**found, **{name: str(deepspeed / f"{name}.json") for name in DEEPSPEED_NAMES}}


def wait_for_xtuner() -> None:
    """Register the names when, and only if, this process imports ``xtuner.configs``."""
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if main.parts[-3:] == ("xtuner", "tools", "train.py"):
        from gmai_xtuner.train.status import record_failed_start

        sys.excepthook = record_failed_start
    if not any(isinstance(finder, _AfterXtunerConfigs) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterXtunerConfigs())


class _AfterXtunerConfigs(importlib.machinery.PathFinder):
    """Finds ``xtuner.configs`` as Python does, and calls :func:`register` when it has been loaded."""

    def find_spec(  # type: ignore[override]
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "xtuner.configs":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(configs: ModuleType | None = None) -> None:
    """Enter the names, and let configs name a ``_base_`` of the package; calling it again changes nothing.

    A name of ours wins over a file of xtuner's. A ``_base_`` that is not beside its config is looked for in
    :data:`CONFIGS`: what ``xtuner copy-cfg`` copies is one file, and its bases stay where they are.
    """
    if configs is None:
        import xtuner.configs as configs  # type: ignore[no-redef]
    from mmengine.config import Config

    configs.cfgs_name_path.update(packaged_names())  # type: ignore[union-attr]
    if getattr(Config._get_cfg_path, "finds_packaged", False):
        return
    original = Config._get_cfg_path

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = original(cfg_path, filename)
        if not os.path.exists(path):
            for folder in (CONFIGS, CONFIGS / "variants"):
                if (folder / cfg_path).is_file():
                    return str(folder / cfg_path), None
        return path, scope

    get_cfg_path.finds_packaged = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(get_cfg_path)

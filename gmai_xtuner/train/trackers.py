# SPDX-License-Identifier: Apache-2.0

"""Experiment trackers by one option: ``report_to=wandb``, ``trackio``, ``mlflow``, or several of them.

They may lie on another machine, so they get the config and numbers alone: mmengine's own backends would also
send images of sample answers, the log and the Python files around.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import (
    BaseVisBackend,
    MLflowVisBackend,
    WandbVisBackend,
    force_init_env,
)

PROJECT = "gmai-vl"
BACKENDS: dict[str, dict[str, Any]] = {
    "wandb": {"type": "WandbNumbers", "init_kwargs": {"project": PROJECT}},
    "trackio": {"type": "TrackioVisBackend"},
    "mlflow": {"type": "MLflowNumbers", "exp_name": PROJECT, "artifact_suffix": ()},
}


def chosen(cfg: Mapping[str, Any]) -> list[str]:
    """Return the trackers that ``report_to`` names: a name, several with commas, or a list."""
    named = cfg.get("report_to") or []
    names = named.split(",") if isinstance(named, str) else named
    return [name.strip() for name in names if name.strip() not in ("none", "tensorboard")]


def tracker_problems(cfg: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each tracker that is unknown, or whose package is not installed."""
    problems = []
    for name in chosen(cfg):
        if name not in BACKENDS:
            problems.append(f"report_to={name!r} is not known. Take {', '.join(BACKENDS)}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"report_to={name} needs a package: pip install {name}")
    return problems


def add_trackers(cfg: Any, work_dir: str) -> None:
    """Add the chosen trackers to ``visualizer.vis_backends``; a run is called like its work dir."""
    name = Path(work_dir).name
    names: dict[str, dict[str, Any]] = {
        "wandb": {"init_kwargs": {"project": PROJECT, "name": name}},
        "trackio": {"name": name},
        "mlflow": {"run_name": name},
    }
    more = [{**BACKENDS[tracker], **names[tracker]} for tracker in chosen(cfg)]
    cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, *more]


@VISBACKENDS.register_module()
class WandbNumbers(WandbVisBackend):
    """mmengine's backend without images and without the code of the working directory."""

    @force_init_env
    def add_config(self, config: Any, **_: Any) -> None:
        self._wandb.config.update(config.to_dict(), allow_val_change=True)

    def add_image(self, *_: Any, **__: Any) -> None:
        """Do nothing: images may be patients'."""


@VISBACKENDS.register_module()
class MLflowNumbers(MLflowVisBackend):
    """mmengine's backend without images; files of the work dir stay there, too (``artifact_suffix``)."""

    def add_image(self, *_: Any, **__: Any) -> None:
        """Do nothing: images may be patients'."""


@VISBACKENDS.register_module()
class TrackioVisBackend(BaseVisBackend):
    """Numbers and config for Trackio.

    Args:
        save_dir: of the run; Trackio has a folder of its own (``TRACKIO_DIR``).
        project: in Trackio.
        name: of the run.
    """

    def __init__(self, save_dir: str, project: str = PROJECT, name: str | None = None) -> None:
        super().__init__(save_dir)
        self._project, self._name = project, name

    def _init_env(self) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project=self._project, name=self._name)

    @property
    @force_init_env
    def experiment(self) -> Any:
        return self._trackio

    @force_init_env
    def add_config(self, config: Any, **_: Any) -> None:
        self._trackio.config.update(config.to_dict())

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **_: Any) -> None:
        self._trackio.log({name: float(value)}, step=step)

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **_: Any
    ) -> None:
        numbers = {k: float(v) for k, v in scalar_dict.items() if isinstance(v, int | float)}
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        if hasattr(self, "_trackio"):
            self._trackio.finish()

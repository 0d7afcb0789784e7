# SPDX-License-Identifier: Apache-2.0

"""Experiment trackers by one option: ``report_to=wandb``, ``mlflow``, or both.

They may lie on another machine, so they get the config and numbers alone: mmengine's own backends would also
send images of sample answers, the log and the Python files around, and W&B itself all that is printed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import MLflowVisBackend, WandbVisBackend, force_init_env

PROJECT = "gmai-vl"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What to install: the whole ``mlflow`` needs other versions of what the training needs."""
NO_TRACKIO = (
    "report_to=trackio: Trackio needs a newer huggingface_hub than transformers 4.48 takes. In another "
    "environment: pip install 'trackio[tensorboard]', then trackio.import_tf_events(WORK_DIR, project=...)"
)
# What else W&B would send: the console (paths, sample answers), the code, the machine and its packages.
SILENT = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


def chosen(cfg: Mapping[str, Any]) -> list[str]:
    """Return the trackers that ``report_to`` names: a name, several with commas, or a list."""
    named = cfg.get("report_to") or []
    names = named.split(",") if isinstance(named, str) else named
    return [name.strip() for name in names if name.strip() not in ("none", "tensorboard")]


def tracker_problems(cfg: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each tracker that is unknown, not installed, or has nowhere to write."""
    problems = []
    for name in chosen(cfg):
        if name == "trackio":
            problems.append(NO_TRACKIO)
        elif name not in PACKAGES:
            problems.append(f"report_to={name!r} is not known. Take {', '.join(PACKAGES)}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"report_to={name} needs a package: pip install {PACKAGES[name]}")
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            problems.append(
                "report_to=mlflow needs MLFLOW_TRACKING_URI in the environment, the address of your server"
            )
    return problems


def add_trackers(cfg: Any, work_dir: str) -> None:
    """Add the chosen trackers to ``visualizer.vis_backends``; a run is called like its work dir."""
    name = Path(work_dir).name
    backends: dict[str, dict[str, Any]] = {
        "wandb": {
            "type": "WandbNumbers",
            "init_kwargs": {"project": PROJECT, "name": name, "settings": SILENT},
        },
        "mlflow": {
            "type": "MLflowNumbers",
            "exp_name": PROJECT,
            "run_name": name,
            "artifact_suffix": (),
        },
    }
    more = [backends[tracker] for tracker in chosen(cfg)]
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

    def _init_env(self) -> None:
        # Not in the config, which others see: an address may hold a password.
        self._tracking_uri = os.environ["MLFLOW_TRACKING_URI"]
        super()._init_env()

    def add_image(self, *_: Any, **__: Any) -> None:
        """Do nothing: images may be patients'."""

# SPDX-License-Identifier: Apache-2.0

"""What ``xtuner train`` does before it builds: hold the work dir, check every setting, add trackers."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import MLflowVisBackend, WandbVisBackend, force_init_env

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import is_running
from gmai_xtuner.train import status

if TYPE_CHECKING:
    from gmai_xtuner.train.settings import Settled

NO_DEEPSPEED = (
    "GMAI-VL trains with DeepSpeed: add --deepspeed zero2 (or zero1, zero3, zero2_offload, "
    "zero3_offload)"
)

MOST_WEIGHTS_WITHOUT_GPU = 1_000_000_000
DRIVER_FILE = Path("/proc/driver/nvidia/version")

log = logging.getLogger(__name__)


def begin(arguments: Any) -> None:
    """Take the work dir that the command names, or its config; ``status.json`` says ``starting`` from now on.

    Raises:
        GMAIError: another run has it, or it has checkpoints and ``--resume`` was not given.
    """
    launcher = os.environ.get("GMAI_LAUNCHER")
    if launcher and not is_running(int(launcher)):
        raise GMAIError("the gmai-train command that started this run has gone")
    cfg = command_config(arguments)
    named = arguments.work_dir or cfg.get("work_dir")
    work_dir = Path(named or os.path.join("work_dirs", Path(arguments.config).stem))
    resumes = arguments.resume is not None or bool(cfg.get("resume"))
    status.start_keeper(status.claim(work_dir, resumes=resumes))


def command_config(arguments: Any) -> Mapping[str, Any]:
    """Return the config that ``xtuner train`` was given, overrides merged, without its imports.

    An override that can't be merged is left to xtuner, which reads the config next and says so.
    """
    from mmengine.config import Config
    from xtuner.configs import cfgs_name_path

    file = arguments.config
    cfg = Config.fromfile(
        file if os.path.isfile(file) else cfgs_name_path[file], import_custom_modules=False
    )
    with suppress(KeyError, TypeError, AttributeError, AssertionError):
        cfg.merge_from_dict(arguments.cfg_options or {})
    return cfg


def check(cfg: Any, *, options: Mapping[str, Any] | None, deepspeed: str | None) -> Settled:
    """Check every setting of a run; return what DeepSpeed is given, and log what is overruled of its file.

    The overrides, ``options``, are merged into ``cfg`` already.

    Raises:
        GMAIError: something is read by nothing, refused or contradicts itself; names all of it.
    """
    from gmai_xtuner.train.settings import read

    if problems := setting_problems(cfg, options):
        raise GMAIError("; ".join(problems))
    if deepspeed is None:
        raise GMAIError(NO_DEEPSPEED)
    settled = read(deepspeed, cfg).require()
    for line in settled.overruled:
        log.warning("DeepSpeed file %s, %s", deepspeed, line)
    check_device(cfg.model.get("llm") or {})
    return settled


def check_device(llm: Mapping[str, Any]) -> None:
    """Refuse to train a large model on the CPU, which torch falls back to without a word.

    Of the language model's base only ``config.json`` is read.

    Raises:
        GMAIError: it has more than :data:`MOST_WEIGHTS_WITHOUT_GPU` weights, torch sees no GPU, and
            ``GMAI_ALLOW_CPU`` is not set.
    """
    import torch
    from accelerate import init_empty_weights
    from xtuner.registry import BUILDER

    if torch.cuda.is_available() or os.environ.get("GMAI_ALLOW_CPU", "0") != "0" or not llm:
        return
    with init_empty_weights():
        model = BUILDER.build(llm)
    weights = sum(weight.numel() for weight in model.parameters())
    if weights <= MOST_WEIGHTS_WITHOUT_GPU:
        return
    driver = re.search(r"(\d+\.\d+)", DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    found = f"the NVIDIA driver is {driver[1]}" if driver else "no NVIDIA driver is loaded"
    raise GMAIError(
        f"torch sees no GPU, and the language model has {weights / 1e9:.1f} billion weights: {found}, torch "
        f"{torch.__version__} is built for CUDA {torch.version.cuda}. CUDA 13 needs driver 580 or newer; for "
        "an older one install the CUDA 12.6 wheels of the same torch and torchvision. To train on the CPU "
        "all the same, set GMAI_ALLOW_CPU=1"
    )


def learning_parts(model: Mapping[str, Any]) -> set[str]:
    """Return the parts of the model, as a config describes it, that learn."""
    bases = ("llm", "visual_encoder")
    learn = {part for part in bases if model.get(f"{part}_lora") or not model.get(f"freeze_{part}")}
    return {"projector", *learn}


def check_something_learns(model: Mapping[str, Any], images: float) -> None:
    """Check that an epoch has images, where nothing learns from text.

    Raises:
        GMAIError: only the vision path learns, and it never sees an image.
    """
    if not images and "llm" not in learning_parts(model):
        raise GMAIError(
            "none of the conversations has an image, and the language model is frozen: nothing would learn. "
            "Take a mixture with images for this stage (ratio above 0), or train the language model "
            "(stage 3, model.freeze_llm=False)"
        )


def setting_problems(cfg: Any, options: Mapping[str, Any] | None) -> list[str]:
    """Return a sentence for each setting with which a run would be another than its config says."""
    from gmai_xtuner.train.settings import unread_settings

    if problems := unread_settings(cfg, options):
        return problems
    problems = tracker_problems(cfg)
    wrapper = cfg.optim_wrapper
    learning = learning_parts(cfg.model)
    for part, rate in ((wrapper.get("optimizer") or {}).get("lr_by_part") or {}).items():
        place = f"optim_wrapper.optimizer.lr_by_part.{part}"
        if part not in learning:
            problems.append(f"{place}: {part} does not learn in this stage. Remove it")
        elif isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
            problems.append(f"{place} must be a learning rate above 0 and below 1, got {rate!r}")
    if (cfg.get("default_hooks", {}).get("checkpoint") or {}).get("save_best"):
        problems.append(
            "default_hooks.checkpoint.save_best is not taken, since it is not written aside. Give "
            "default_hooks.best.keep=True (monitor, rule)"
        )
    if (wrapper.get("clip_grad") or {}).get("max_norm") is None:
        problems.append(
            "optim_wrapper.clip_grad has no max_norm, and xtuner would clip at 1.0. For no clipping give "
            "optim_wrapper.clip_grad.max_norm=0"
        )
    if wrapper.get("dtype", "bfloat16") not in ("bfloat16", "float32"):
        problems.append(
            f"optim_wrapper.dtype={wrapper.dtype!r} is not trained in: the DeepSpeed file decides, in bf16 "
            "or fp32. Leave it at bfloat16"
        )
    return problems


# --- experiment trackers ---
# They may lie on another machine, so they get the config and numbers alone: mmengine's own backends would
# also send images of sample answers, the log and the Python files around, and W&B itself all that is printed.

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

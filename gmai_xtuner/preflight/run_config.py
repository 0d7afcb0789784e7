# SPDX-License-Identifier: Apache-2.0

"""The run that is meant, read as ``xtuner train`` reads it, and what is found about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from mmengine.config import Config

from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.settings import Settled, read

FAIL, WARN, NOTE = "fail", "warn", "note"


class UsageError(Exception):
    """The command line names something that can't be read; exit status 2."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a part of the run, e.g. ``data``.

    ``level`` is ``fail`` (the run would stop), ``warn`` (it would run, perhaps not as meant) or ``note``.
    """

    level: str
    about: str
    text: str


class Findings:
    """Findings in the order in which they were made; none is made twice."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def add(self, level: str, about: str, text: str) -> None:
        finding = Finding(level, about, text)
        if finding not in self.found:
            self.found.append(finding)

    fail = partialmethod(add, FAIL)
    warn = partialmethod(add, WARN)
    note = partialmethod(add, NOTE)

    def of(self, level: str) -> list[Finding]:
        return [finding for finding in self.found if finding.level == level]

    @property
    def would_fail(self) -> bool:
        return bool(self.of(FAIL))

    @contextmanager
    def catch(self, about: str) -> Iterator[None]:
        """Turn the project's own errors, by which a run would stop, into findings and go on."""
        try:
            yield
        except GMAIError as error:
            self.fail(about, str(error))


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """What of a DeepSpeed file decides about memory.

    Args:
        name: as given on the command line.
        precision: ``bf16`` or ``fp32``.
        settings: the settled content.
        zero: its ``zero_optimization`` with DeepSpeed's defaults; sizes are in elements.
    """

    name: str
    precision: str
    settings: dict[str, Any]
    zero: DeepSpeedZeroConfig

    @classmethod
    def from_dict(cls, name: str, config: Mapping[str, Any]) -> ZeroSettings:
        """Read the settled content of a file."""
        precision = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
        zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
        return cls(name, precision, dict(config), zero)

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    def offloads(self, part: str) -> bool:
        """Return whether the ``optimizer`` (with fp32 weights) or the ``param`` is in host memory."""
        offload = getattr(self.zero, f"offload_{part}")
        return offload is not None and offload.device != OffloadDeviceEnum.none


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A run before it begins.

    The ``--cfg-options``, ``options``, are merged into the content of the config file; the DeepSpeed file is
    settled beside it as training does, and ``zero`` is what of it decides about memory. ``gpus`` are those of
    all machines together.
    """

    path: Path
    cfg: Config
    options: Mapping[str, Any]
    deepspeed: Settled
    zero: ZeroSettings
    gpus: int
    work_dir: Path

    @property
    def dataset(self) -> dict[str, Any]:
        return dataset_config(self.cfg)

    @property
    def batch_size(self) -> int:
        """Packs of a micro-batch on one GPU."""
        return int(self.cfg.train_dataloader.get("batch_size", 1))

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimiser step."""
        return int(self.cfg.optim_wrapper.get("accumulative_counts", 1))

    @property
    def optimizer(self) -> str:
        return str(self.cfg.optim_wrapper.get("optimizer", {}).get("type", "AdamW"))

    @property
    def max_length(self) -> int:
        """Tokens of a pack."""
        return int(self.dataset.get("max_length", 2048))


def load_run(
    config: str,
    *,
    deepspeed: str,
    gpus: int,
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
) -> RunConfig:
    """Read a config and a DeepSpeed file as ``xtuner train`` does, whose arguments these are.

    Raises:
        UsageError: a file that is not there or can't be read.
    """
    from xtuner.configs import cfgs_name_path

    path = Path(config if Path(config).is_file() else cfgs_name_path.get(config, config))
    if not path.is_file():
        raise UsageError(f"there is no config {config!r}")
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(dict(options or {}))
    # A config is Python code: whatever is wrong with it, that is what the user wants to read.
    except Exception as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    for key in ("model", "train_dataloader", "train_cfg", "optim_wrapper"):
        if not isinstance(cfg.get(key), Mapping):
            raise UsageError(f"{path} has no {key!r}. Is it one of configs/gmai_vl/*.py?")
    try:
        settled = read(deepspeed, cfg)
    except GMAIError as error:
        raise UsageError(str(error)) from error
    zero = ZeroSettings.from_dict(deepspeed, settled.settings)
    own = cfg.get("work_dir") or f"work_dirs/{path.stem}"
    return RunConfig(path, cfg, options or {}, settled, zero, gpus, Path(work_dir or own))

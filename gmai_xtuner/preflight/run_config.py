# SPDX-License-Identifier: Apache-2.0

"""The run that is meant: config, DeepSpeed file, GPUs, work dir; read as ``xtuner train`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.deepspeed_settings import Settled, read


class UsageError(Exception):
    """The command line names something that can't be read; exit status 2."""


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """What of a DeepSpeed file decides about memory. Sizes are in elements.

    Args:
        name: as given on the command line.
        stage: 0 to 3.
        precision: ``bf16`` or ``fp32``.
        grad_accum_bytes: of one value of a step's summed gradient (``data_types.grad_accum_dtype``;
            without the key that of ``precision``).
        exchange_bytes: of one value of a gradient that is exchanged (``communication_data_type``; without
            the key that of ``precision``).
        offload_optimizer: optimiser states and fp32 weights in host memory.
        offload_param: weights in host memory too (stage 3).
        overlap_comm: two buckets for gradients instead of one.
        contiguous_gradients: gradients are copied to a bucket.
        reduce_bucket_size: of one bucket.
        max_live_parameters: stage 3 gathers at the most so many weights at a time.
        prefetch_bucket_size: and so many ahead.
        sub_group_size: stage 3 steps so many weights at a time.
    """

    name: str
    stage: int
    precision: str
    grad_accum_bytes: int
    exchange_bytes: int
    offload_optimizer: bool
    offload_param: bool
    overlap_comm: bool
    contiguous_gradients: bool
    reduce_bucket_size: int
    max_live_parameters: int
    prefetch_bucket_size: int
    sub_group_size: int

    @classmethod
    def from_dict(cls, name: str, config: Mapping[str, Any]) -> ZeroSettings:
        """The defaults are those of DeepSpeed 0.16.2 (``runtime/zero/config.py``).

        Args:
            name: of the file.
            config: its content, settled.
        """
        from deepspeed.runtime.config import DtypeEnum

        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        precision = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
        summed = (config.get("data_types") or {}).get("grad_accum_dtype") or precision
        exchanged = config.get("communication_data_type") or precision

        def number(key: str, default: float) -> int:
            return int(zero.get(key, default))

        def offloads(key: str) -> bool:
            return (zero.get(key) or {}).get("device", "none") not in ("none", None)

        return cls(
            name=name,
            stage=stage,
            precision=precision,
            grad_accum_bytes=DtypeEnum(summed).value.itemsize,
            exchange_bytes=DtypeEnum(exchanged).value.itemsize,
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            reduce_bucket_size=number("reduce_bucket_size", 5e8),
            max_live_parameters=number("stage3_max_live_parameters", 1e9),
            prefetch_bucket_size=number("stage3_prefetch_bucket_size", 5e7),
            sub_group_size=number("sub_group_size", 1e9),
        )


@dataclass(frozen=True, slots=True)
class RunConfig:
    """See the module.

    Args:
        path: the config file.
        cfg: its content, ``--cfg-options`` merged.
        options: ``--cfg-options``.
        deepspeed: the DeepSpeed file, settled beside the config as training does.
        zero: what of it decides about memory.
        gpus: of all machines together.
        work_dir: where checkpoints go.
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
        """Arguments of the training dataset."""
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
    """Read a config and a DeepSpeed file as ``xtuner train`` does.

    Args:
        config: a file, or a name that xtuner knows.
        deepspeed: one of our names (``zero2``), one of xtuner's, or a file.
        gpus: of all machines together.
        options: ``--cfg-options``.
        work_dir: as for ``xtuner train``; default: the config's own, else ``work_dirs/<its name>``.

    Raises:
        UsageError: a file that is not there or can't be read.
    """
    from xtuner.configs import cfgs_name_path

    path = Path(config if Path(config).is_file() else cfgs_name_path.get(config, config))
    if not path.is_file():
        raise UsageError(f"there is no config {config!r}")
    try:
        cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(dict(options))
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

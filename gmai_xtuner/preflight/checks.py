# SPDX-License-Identifier: Apache-2.0

"""What would stop the run though model and data are fine: weights, earlier stages, options, disk space."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmai_xtuner.checkpoint.bases import NOT_VISION
from gmai_xtuner.checkpoint.layouts import is_export, text_model, vision_model
from gmai_xtuner.checkpoint.llava import check_no_language_model, without_prefix
from gmai_xtuner.checkpoint.training import (
    checkpoints_in,
    first_rank_file,
    load_parts,
    resolve_checkpoint,
    what_is_wrong,
)
from gmai_xtuner.checkpoint.weights import read_training_state
from gmai_xtuner.core.config import accumulation
from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.core.hub import has_weights, resolve_directory
from gmai_xtuner.data.plan import DataPlan, unknown_lines
from gmai_xtuner.model.internlm2 import convert_state_dict, llama_config, raise_on_keys
from gmai_xtuner.model.lora import is_adapter_key, load_adapters, plain_key, split_adapters
from gmai_xtuner.preflight.data import DataSummary
from gmai_xtuner.preflight.memory import GIB, PartCount, build_on_meta, moment_bytes
from gmai_xtuner.preflight.run_config import FAIL, WARN, Findings, RunConfig
from gmai_xtuner.train.start import check_something_learns, setting_problems


def check_options(run: RunConfig, findings: Findings) -> None:
    """Report settings that training refuses, by its own check, and classes that it relies on."""
    for problem in setting_problems(run.cfg, run.options):
        findings.fail("config", problem)
    for problem in run.deepspeed.refused:
        findings.fail("deepspeed", problem)
    for line in run.deepspeed.overruled:
        findings.note("deepspeed", line)
    with findings.catch("config"):
        accumulation(run.cfg)
    if rates := run.cfg.optim_wrapper.optimizer.get("lr_by_part"):
        by_part = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
        rest = f"{run.cfg.optim_wrapper.optimizer.get('lr')} for all else"
        findings.note("config", f"learning rate by part: {by_part}; {rest}")
    loop = run.cfg.train_cfg.get("type")
    if loop != "PackedTrainLoop":
        findings.fail("config", f"train_cfg.type is {loop!r}, not 'PackedTrainLoop'")
    if run.zero.precision == "fp32":
        findings.warn(
            "config",
            f"--deepspeed {run.zero.name} trains in fp32: twice the memory of bf16, and no "
            "variable-length attention kernel",
        )


def _some(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def check_data(run: RunConfig, data: DataSummary, plan: DataPlan, findings: Findings) -> None:
    """Check that there is enough data for a step and all GPUs, something to learn from and to validate on."""
    with findings.catch("data"):
        check_something_learns(run.cfg.model, data.images)
    if data.packs < data.packs_per_step:
        findings.warn(
            "data",
            f"{data.packs} packs are fewer than the {data.packs_per_step} of one optimiser step "
            f"(GPUs x packs x micro-batches: {run.gpus} x {run.batch_size} x {run.accumulation}): an epoch "
            "is one short step. Lower batch_size or accumulative_counts, or raise max_epochs",
        )
    if data.packs < run.gpus:
        findings.warn(
            "data",
            f"{run.gpus} GPUs share {_some(data.packs, 'pack')}: {_some(run.gpus - data.packs, 'GPU')} "
            f"would have nothing to learn. The run starts all the same; {_some(data.packs, 'GPU')} would do",
        )
    if plan.held_out > 0 and not any(row.held_out for row in data.datasets):
        records = sum(row.records for row in data.datasets)
        findings.note(
            "data",
            f"nothing is held out of {_some(records, 'record')}, so there will be no validation: "
            f"train_dataloader.dataset.held_out={plan.why_nothing_held_out()} (--cfg-options "
            "train_dataloader.dataset.held_out=...)",
        )
    if (excluded := plan.excluded()).unknown:
        findings.warn("data", unknown_lines(excluded))


def check_base_weights(run: RunConfig, model: nn.Module, findings: Findings) -> None:
    """Check that the weights of both bases are there and fit, without reading their values."""
    for part, load in (("llm", _check_llm), ("visual_encoder", _check_tower)):
        name = run.cfg.model.get(part, {}).get("pretrained_model_name_or_path")
        if not isinstance(name, str):
            continue
        local = Path(name).expanduser().is_dir()
        try:
            folder = resolve_directory(name, weights=False)
            if has_weights(folder) or local:
                load(folder, getattr(model, part))
            else:
                findings.warn(
                    part, f"the weights of {name} are not on this machine; training downloads them"
                )
        except GMAIError as error:
            findings.fail(part, str(error))


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(value, device="meta") for name, value in weights.items()}


def _check_llm(folder: Path, model: nn.Module) -> None:
    raw, weights = text_model(folder)
    if raw.get("model_type") == "internlm2":
        shapes = _shapes(weights)
        config = llama_config(raw)
        if config.tie_word_embeddings:
            shapes.pop("output.weight", None)
        convert_state_dict(shapes, config)


def _check_tower(folder: Path, model: nn.Module) -> None:
    stored = vision_model(folder)[1]
    wanted = {plain_key(name) for name, _ in model.named_parameters() if not is_adapter_key(name)}
    raise_on_keys(
        sorted(wanted - stored.keys()),
        sorted(name for name in stored.keys() - wanted if not name.startswith(NOT_VISION)),
        str(folder),
    )


def check_stage_before(run: RunConfig, model: Any, findings: Findings) -> None:
    """Check that ``pretrained_pth`` is there, has the parts, and fits; by names and shapes alone."""
    source = run.cfg.model.get("pretrained_pth")
    if source is None:
        return
    with findings.catch("stage before"):
        if is_export(source):
            return
        base, adapters = split_adapters(checkpoint_shapes(resolve_checkpoint(source)))
        check_no_language_model(model, base, source=str(source))
        required = set(run.cfg.model.get("pretrained_parts", ("projector",)) or ())
        plain = {key: v for key, v in run.cfg.model.items() if not key.endswith("_lora")}
        bare = build_on_meta(plain) if len(plain) < len(run.cfg.model) else model
        adapted = {key.split(".", 1)[0] for key in adapters}
        load_parts(bare, base, required=required - adapted, source=str(source))
        load_adapters(model, adapters, source=str(source))


def checkpoint_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Return names and shapes of what a checkpoint trained, on the meta device.

    Of a DeepSpeed directory the first rank's file has the shapes of all. A file that can't be read is a
    ``ModelLoadError``.
    """
    file = first_rank_file(path) or path
    try:
        # Memory-mapped: of the tensors nothing but their descriptions is read.
        content = read_training_state(file, mmap=True)
    except OSError as error:
        raise ModelLoadError(f"{file} can't be read ({type(error).__name__}: {error})") from error
    if path.is_dir():
        shapes = {k: v for group in content.get("param_shapes", ()) for k, v in group.items()}
        trained = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return trained | _shapes(without_prefix(content.get("module", {})))
    state = content.get("state_dict", content)
    return _shapes({name: value for name, value in state.items() if torch.is_tensor(value)})


def check_disk(
    run: RunConfig,
    counts: Mapping[str, PartCount],
    steps: int | None,
    findings: Findings,
    *,
    elsewhere: bool = False,
) -> dict[str, Any]:
    """Check that the work dir has room for the checkpoints that are kept, and for one being written.

    Whole checkpoints in the work dir count as some of those that are kept, which they are when the run is
    resumed; the one being written needs its room in any case.

    Args:
        run, findings: what is checked, and what takes the faults.
        counts: parameters by part; trained ones are kept in bf16 and fp32, with the optimiser's moments.
        steps: optimiser steps of the run, which intervals count; ``None`` if they are not known.
        elsewhere: the run is planned for another machine: too little room here is a warning.

    Returns:
        the numbers for the report.
    """
    trained = sum(part.trainable for part in counts.values())
    size = trained * (2 + 4 + moment_bytes(run.optimizer))
    hooks = run.cfg.get("default_hooks", {})
    hook = hooks.get("checkpoint") or {}
    keep, interval = hook.get("max_keep_ckpts", -1), hook.get("interval", -1)
    written = max(1, math.ceil((steps or 0) / interval)) if interval > 0 else 1
    kept = _at_a_time(keep, written) + bool((hooks.get("best") or {}).get("keep"))
    folders = (run.work_dir.absolute(), *run.work_dir.absolute().parents)
    free = shutil.disk_usage(next(folder for folder in folders if folder.is_dir())).free
    whole = [path for path in checkpoints_in(run.work_dir) if what_is_wrong(path) is None]
    files = (file for path in whole for file in (path, *path.rglob("*")) if file.is_file())
    taken = sum(file.stat().st_size for file in files)
    if max(size, kept * size - taken) > free:
        already = f", and has {taken / GIB:.1f} GiB of them" if whole else ""
        if steps is None:
            why = "at least: how many the run writes is not known"
        elif keep >= 1 and kept > keep:
            why = f"max_keep_ckpts {keep}, and one being written"
        else:
            why = f"all that the run writes; max_keep_ckpts {keep}"
        at_a_time = {number: _at_a_time(number, written) for number in range(1, kept)}
        fewer = [
            number
            for number, many in at_a_time.items()
            if many < kept and max(size, many * size - taken) <= free
        ]
        option = "default_hooks.checkpoint.max_keep_ckpts"
        remedy = f", or --cfg-options {option}={fewer[-1]}" if fewer else ""
        choose = "On the machine that trains, this room is needed; else choose"
        findings.add(
            WARN if elsewhere else FAIL,
            "disk",
            f"{run.work_dir} has {free / GIB:.1f} GiB free, but holds {kept} x about {size / GIB:.1f} GiB "
            f"of checkpoints at a time ({why}){already}. {choose if elsewhere else 'Choose'} another "
            f"--work-dir{remedy}",
        )
    return {
        "checkpoint_gib": round(size / GIB, 3),
        "at_a_time": kept,
        "already_there_gib": round(taken / GIB, 3),
        "free_gib": round(free / GIB, 1),
    }


def _at_a_time(keep: int, written: int) -> int:
    """Return how many are on disk at a time, if ``written`` are written and ``keep`` kept (below 1: all)."""
    return written if keep < 1 else min(keep + 1, written)

# SPDX-License-Identifier: Apache-2.0

"""DeepSpeed files: every key is honoured, overruled by the config with a line that says so, or refused.

DeepSpeed itself reads some sections behind the config's back (``scheduler`` sets the learning rate), leaves
out others without a word, and finds wrong values only when all weights are loaded. ``xtuner train`` and the
preflight settle a file by :func:`settle` before anything else; the names are those of DeepSpeed 0.16.2
(``deepspeed/runtime/config.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import GMAIError

_HONOURED = """
zero_optimization bf16 data_types zero_allow_untested_optimizer zero_force_ds_cpu_optimizer aio
communication_data_type disable_allgather prescale_gradients gradient_predivide_factor timers
comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state
"""
_NOT_TRAINED_WITH = """
progressive_layer_drop eigenvalue quantize_training compression_training weight_quantization
sparse_attention pipeline hybrid_engine graph_harvesting compile tensor_parallel
use_data_before_expert_parallelism seq_parallel_comm_data_type
"""
HONOURED = frozenset(_HONOURED.split())
"""Handed to DeepSpeed as they are."""

CONFIG_DECIDES = {
    "gradient_accumulation_steps": "optim_wrapper.accumulative_counts",
    "train_micro_batch_size_per_gpu": "train_dataloader.batch_size",
    "gradient_clipping": "optim_wrapper.clip_grad.max_norm",
}
"""Keys whose value is the config's, under the name given here."""

DROPPED = {
    "train_batch_size": "it follows from the GPUs, train_dataloader.batch_size and "
    "optim_wrapper.accumulative_counts",
    "steps_per_print": "default_hooks.logger.interval says how often is logged",
    "activation_checkpointing": "model.use_activation_checkpointing and model.recomputed_layers decide",
    "sparse_gradients": "no layer has sparse gradients",
    "dataloader_drop_last": "the batch sampler deals out every pack",
}
"""Keys that ask for what this project decides elsewhere."""

REFUSED = {
    "fp16": "training is in bf16. Remove fp16 and give bf16: {enabled: true}",
    "amp": "training is in bf16. Remove amp and give bf16: {enabled: true}",
    "scheduler": "the learning rate follows the config's param_scheduler. Remove it; for a warm-up give "
    "--cfg-options param_scheduler.warmup_ratio=...",
    "optimizer": "the config names the optimiser. Remove it, and give --cfg-options "
    "optim_wrapper.optimizer.lr=... (type, weight_decay, betas)",
    "tensorboard": "the log has its own. Remove it; visualizer.vis_backends names what is written",
    "wandb": "the log has its own. Remove it; give --cfg-options report_to=wandb",
    "csv_monitor": "the log has its own. Remove it; vis_data/scalars.json has every number",
    "comet": "the log has its own. Remove it; visualizer.vis_backends names what is written",
    "checkpoint": "checkpoints are written by default_hooks.checkpoint. Remove it",
    "nebula": "checkpoints are written by default_hooks.checkpoint. Remove it",
    "curriculum_learning": "packs are dealt by the sampler. Remove it",
    "data_efficiency": "packs are dealt by the sampler. Remove it",
    "elasticity": "a step always has the config's number of packs. Remove it",
    "autotuning": "it starts runs of its own. Remove it; the preflight says what fits",
    **dict.fromkeys(_NOT_TRAINED_WITH.split(), "GMAI-VL does not train with it. Remove it"),
}
"""Keys that would change what is learnt, or that nothing would heed; and what to do instead."""


@dataclass(slots=True)
class Settled:
    """A DeepSpeed file beside a config.

    Args:
        name: of the file, as given on the command line.
        settings: what DeepSpeed is given.
        overruled: a sentence each about keys whose value is not taken.
        refused: a sentence each about keys with which no run starts.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    overruled: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def require(self) -> Settled:
        """Return itself.

        Raises:
            GMAIError: a key is refused; names all of them.
        """
        if self.refused:
            raise GMAIError(f"DeepSpeed file {self.name}: " + ". ".join(self.refused))
        return self


def find_file(name: str) -> Path:
    """Return the file that ``--deepspeed NAME`` means.

    Raises:
        GMAIError: there is none.
    """
    from xtuner.configs import cfgs_name_path

    file = Path(name if Path(name).is_file() else cfgs_name_path.get(name, ""))
    if not file.is_file():
        raise GMAIError(
            f"--deepspeed {name}: no such file, and no name that xtuner knows. Give zero1, zero2, zero3, "
            "zero2_offload, zero3_offload or a JSON file"
        )
    return file


def read(name: str, cfg: Mapping[str, Any]) -> Settled:
    """Read the file that ``--deepspeed NAME`` means and settle it.

    Args:
        name: of the file.
        cfg: the training config.

    Raises:
        GMAIError: no such file, or it is not one JSON object.
    """
    try:
        text = find_file(name).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, OSError) as error:
        if isinstance(error, GMAIError):
            raise
        raise GMAIError(f"DeepSpeed file {name} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise GMAIError(f"DeepSpeed file {name} must hold one JSON object, not a {type(content)}")
    return settle(name, content, cfg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        raise ValueError(f"{', '.join(twice)} stands in it more than once")
    return found


def settle(name: str, content: Mapping[str, Any], cfg: Mapping[str, Any]) -> Settled:
    """Decide each key of a DeepSpeed file.

    Args:
        name: of the file, for the sentences.
        content: of the file; stays as it is.
        cfg: the training config.
    """
    settled = Settled(name)
    for key, value in content.items():
        if key in CONFIG_DECIDES:
            ours = _config_value(key, cfg)
            if value not in ("auto", ours):
                settled.overruled.append(
                    f"{key}: {value!r} is not taken, the config has {CONFIG_DECIDES[key]}={ours!r}"
                )
        elif key in DROPPED:
            if value != "auto":
                settled.overruled.append(f"{key} is not taken: {DROPPED[key]}")
        elif key in REFUSED:
            _refuse(settled, key, value)
        elif key in HONOURED:
            settled.settings[key] = _without_auto(settled, key, value)
        else:
            near = get_close_matches(key, [*HONOURED, *CONFIG_DECIDES, *DROPPED], n=1)
            meant = f"Did you mean {near[0]!r}?" if near else "Remove it"
            settled.refused.append(f"DeepSpeed reads no {key!r}. {meant}")
    for key in CONFIG_DECIDES:
        settled.settings[key] = "auto"
    _settle_precision(settled, content)
    _check_values(settled)
    return settled


def _config_value(key: str, cfg: Mapping[str, Any]) -> Any:
    """Return what xtuner gives DeepSpeed for a key of :data:`CONFIG_DECIDES`."""
    if key == "train_micro_batch_size_per_gpu":
        return cfg["train_dataloader"].get("batch_size", 1)
    wrapper = cfg["optim_wrapper"]
    if key == "gradient_accumulation_steps":
        return wrapper.get("accumulative_counts", 1)
    return (wrapper.get("clip_grad") or {}).get("max_norm", 1.0)


def _refuse(settled: Settled, key: str, value: Any) -> None:
    """Refuse what a section asks for; one that leaves everything to the config asks for nothing."""
    if not value or (isinstance(value, Mapping) and value.get("enabled") is False):
        return
    given = value if isinstance(value, Mapping) else {"": value}
    parameters = given.get("params", given) or {}
    if key in ("scheduler", "optimizer") and set(parameters.values()) <= {"auto"}:
        settled.overruled.append(f"{key} is not taken: {REFUSED[key].partition('.')[0]}")
    elif given.get("enabled") == "auto" or value == "auto":
        settled.overruled.append(f"{key}: 'auto' is off: {REFUSED[key].partition('.')[0]}")
    else:
        settled.refused.append(f"{key} can't be honoured: {REFUSED[key]}")


def _without_auto(settled: Settled, path: str, value: Any) -> Any:
    """Leave out what says ``"auto"`` inside a section, so that DeepSpeed's own default holds."""
    if not isinstance(value, Mapping) or path == "bf16":
        return value
    kept = {}
    for key, inner in value.items():
        if inner == "auto":
            settled.overruled.append(f"{path}.{key}: 'auto' becomes DeepSpeed's own default")
        else:
            kept[key] = _without_auto(settled, f"{path}.{key}", inner)
    return kept


def _settle_precision(settled: Settled, content: Mapping[str, Any]) -> None:
    """``"auto"`` is bf16, as the config trains, on every device."""
    asked = [content.get(kind) for kind in ("bf16", "fp16")]
    automatic = [isinstance(value, Mapping) and value.get("enabled") == "auto" for value in asked]
    brain = settled.settings.get("bf16")
    if automatic[0] or (automatic[1] and not (brain or {}).get("enabled")):
        settled.settings["bf16"] = {**(brain or {}), "enabled": True}


def _check_values(settled: Settled) -> None:
    """Let DeepSpeed check the sections whose values it would refuse when all weights are loaded."""
    from deepspeed.runtime.config import DtypeEnum
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for key in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(settled.settings.get(key, {}), Mapping):
            settled.refused.append(f"{key} must be an object, not {settled.settings.pop(key)!r}")
    zero = settled.settings.get("zero_optimization", {})
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            near = get_close_matches(place, DeepSpeedZeroConfig.model_fields, n=1)
            meant = f". Did you mean {near[0]!r}?" if near and near[0] != place else ""
            settled.refused.append(
                f"zero_optimization.{place}: {problem['msg']}, got {problem['input']!r}{meant}"
            )
            zero.pop(str(problem["loc"][0]), None) if problem["loc"] else zero.clear()
    for part, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3))):
        asked = (zero.get(part) or {}).get("device", "none")
        if asked != "none" and zero.get("stage", 0) not in stages:
            settled.refused.append(
                f"zero_optimization.{part} is read by stage {' or '.join(map(str, stages))} alone. Remove "
                "it, or change the stage"
            )
    if not isinstance(settled.settings.get("bf16", {}).get("enabled", False), bool):
        settled.refused.append(
            f"bf16.enabled must be true or false: {settled.settings.pop('bf16')}"
        )
    summed = settled.settings.get("data_types", {}).get("grad_accum_dtype")
    try:
        DtypeEnum(summed or "fp32")
    except ValueError:
        settled.refused.append(
            f"data_types.grad_accum_dtype must be fp32, bf16 or fp16, got {summed!r}"
        )
        settled.settings["data_types"].pop("grad_accum_dtype")

# SPDX-License-Identifier: Apache-2.0

"""Settings that nothing reads: a misspelt key, or another program's name for ours, stops the start.

mmengine and xtuner build what they find and leave the rest; a run of days then has other settings than its
user believes. What a section may hold is read from the signature of what it is passed to. A class that
takes ``**kwargs`` hands them to the class it derives from; where that can't be followed (a class of the
user's own), nothing is said.

Of a DeepSpeed file every key is honoured, overruled by the config with a line that says so, or refused.
DeepSpeed itself reads some sections behind the config's back (``scheduler`` sets the learning rate), leaves
out others without a word, and finds wrong values only when all weights are loaded. ``xtuner train`` and the
preflight settle a file by :func:`settle` before anything else; the names are those of DeepSpeed 0.16.2
(``deepspeed/runtime/config.py``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from mmengine import registry
from mmengine.runner import FlexibleRunner, set_random_seed
from torch.utils.data import DataLoader
from xtuner.registry import BUILDER

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.strict_json import STRICT_JSON

TOP_LEVEL = frozenset(inspect.signature(FlexibleRunner).parameters) - {"cfg", "auto_scale_lr"} | {
    "custom_imports",
    "runner_type",
    # xtuner/tools/train.py
    "sequence_parallel_size",
    "use_varlen_attn",
    # gmai_xtuner/core/config.py and checkpoint/export.py
    "export_dtype",
    "image_processor",
    "tokenizer",
    # gmai_xtuner/train/start.py
    "report_to",
}
_LOADER = frozenset(inspect.signature(DataLoader).parameters) - {"shuffle", "drop_last"} | {
    # mmengine's Runner.build_dataloader takes these out.
    "num_batch_per_epoch",
    "disable_subprocess_warning",
}
SECTIONS: dict[str, Collection[str]] = {
    "": TOP_LEVEL,
    "custom_imports": ("imports", "allow_failed_imports"),
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER,
    "test_dataloader": _LOADER | {"shuffle", "drop_last"},
    # xtuner hands the optimiser, the accumulation and the norm to DeepSpeed, and drops the rest.
    "optim_wrapper": ("type", "optimizer", "accumulative_counts", "clip_grad", "dtype"),
    "optim_wrapper.clip_grad": ("max_norm",),
    "optim_wrapper.optimizer.lr_by_part": ("llm", "visual_encoder", "projector"),
    "env_cfg": ("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"),
    "env_cfg.mp_cfg": ("mp_start_method", "opencv_num_threads"),
    "randomness": tuple(inspect.signature(set_random_seed).parameters),
}
"""What sections hold whose reader is no class of its own."""
DEFAULT_TYPES = {"log_processor": "LogProcessor", "visualizer": "Visualizer"}
NEEDED = ("model", "train_dataloader", "train_dataloader.dataset", "optim_wrapper", "train_cfg")
"""Sections without which nothing trains; an override may have put a value in the place of one."""
TAKEN_OUT = {
    "optim_wrapper": ("lr_by_part",),
    "train_cfg": ("by_epoch",),
    "param_scheduler": ("convert_to_iter_based",),
    "default_hooks": ("priority",),
    "custom_hooks": ("priority",),
}
"""Keys that a builder takes out before the class of the section sees them."""
FOLLOWED = ("gmai_xtuner", "mmengine", "torch", "xtuner")
"""Packages whose classes hand ``**kwargs`` to their base, and take nothing out of them."""
_IGNORES_THE_REST = ("transformers.utils.quantization_config",)
"""Modules whose classes take ``**kwargs`` and do nothing with them."""
_REGISTRIES = (
    BUILDER,
    *(value for name, value in vars(registry).items() if name.isupper() and hasattr(value, "get")),
)


def unread_settings(cfg: Any, options: Mapping[str, Any] | None = None) -> list[str]:
    """Return a sentence for every key of a training config that nothing reads; says what is meant.

    Args:
        cfg: the config, ``options`` merged.
        options: what came by ``--cfg-options``. A variable that a config file uses itself may have any name,
            but overriding it does not reach the places that used it.
    """
    for path in NEEDED:
        name = path.rpartition(".")[2]
        above = cfg.get(path.partition(".")[0]) if "." in path else cfg
        if not isinstance(above.get(name), Mapping):
            return [f"{path} must be a section of the config (dict), got {above.get(name)!r}"]
    sections = list(_sections(cfg))
    index: dict[str, str] = {}
    for path, _, known in sections:
        for key in known or () if path else ():
            index.setdefault(key, f"{path}.{key}")
    overridden = {key.partition(".")[0] for key in options or {}}
    problems = []
    for path, section, known in sections:
        if known is None:
            continue
        for key in section:
            if key in known or key in ("type", "_delete_", "_scope_"):
                continue
            if not path and key not in overridden and _is_used(key, getattr(cfg, "text", "")):
                continue
            place = f"{path}.{key}" if path else key
            problems.append(f"nothing reads {place}. {_meant(key, place, known, index)}")
    return problems + list(_builds_nothing(sections))


def arguments_of(kind: Any) -> frozenset[str] | None:
    """Return the names that a class or function takes; ``None`` if its signature does not tell."""
    if not isinstance(kind, type):
        own, takes_more = _names_of(kind)
        return None if takes_more else own
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own, takes_more = _names_of(vars(base)["__init__"])
        names |= own
        if not takes_more or base.__module__ in _IGNORES_THE_REST:
            return frozenset(names)
        if base.__module__.partition(".")[0] not in FOLLOWED:
            return None
    return None


def _names_of(function: Any) -> tuple[frozenset[str], bool]:
    """Return the names of a function's arguments, and whether it takes any other by ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = frozenset(one.name for one in parameters if one.kind not in kinds) - {"self"}
    return names, any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def _sections(
    section: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Mapping[str, Any], Collection[str] | None]]:
    """Yield path, content and accepted keys of every section whose reader is known (``None``: any key)."""
    if path in SECTIONS:
        known: Collection[str] | None = SECTIONS[path]
    else:
        kind = _called(section.get("type", DEFAULT_TYPES.get(path)))
        known = None if kind is None else arguments_of(kind)
        if known is not None:
            known = known | set(TAKEN_OUT.get(path.partition(".")[0], ()))
    yield path, section, known
    for key, value in section.items():
        items = list(enumerate(value)) if isinstance(value, list | tuple) else [("", value)]
        for number, item in items:
            inner = ".".join(str(part) for part in (path, key, number) if part != "")
            if isinstance(item, Mapping):
                yield from _sections(item, inner)


def _called(kind: Any) -> Any:
    """Return the class or function that a ``type`` names; ``None`` if there is none."""
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    for one in _REGISTRIES:
        try:
            found = one.get(kind)
        # What can't be imported stops the build, which says so where it happens.
        except (ImportError, AttributeError):
            found = None
        if found is not None:
            return found
    return None


def _is_used(variable: str, text: str) -> bool:
    """Return whether a config file uses its variable itself: elsewhere than left of an equals sign."""
    code = re.sub(r"#.*", "", text)
    return re.search(rf"(?<![\w.]){variable}\b(?!\s*=[^=])|_base_\.{variable}\b", code) is not None


def _meant(key: str, place: str, known: Collection[str], index: Mapping[str, str]) -> str:
    if meant := HABITS.get(key):
        reason = meant.removeprefix("nothing: ")
        return f"Here it is called {meant}" if reason == meant else f"Remove it: {reason}"
    prefix = place.removesuffix(key)
    if near := _nearest(key, {name: prefix + name for name in known}):
        return near
    if key in index:
        return f"Did you mean {index[key]}?"
    if prefix:
        return f"Known are {', '.join(sorted(known))}"
    otherwise = "Remove it, or override the setting that it was meant for"
    return _nearest(key, index, cutoff=0.8) or otherwise


def _nearest(name: str, known: Mapping[str, Any], *, cutoff: float = 0.6) -> str:
    """Ask whether the known name that is most like this one was meant; empty if none is like it."""
    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"Did you mean {known[near[0]]}?" if near else ""


def _builds_nothing(
    sections: list[tuple[str, Mapping[str, Any], Collection[str] | None]],
) -> Iterator[str]:
    for path, section, _ in sections:
        kind = section.get("type")
        if path and isinstance(kind, str) and _called(kind) is None:
            names = {name for one in _REGISTRIES for name in one.module_dict}
            near = _nearest(kind, {name: name for name in names})
            yield f"{path}.type: nothing is called {kind!r}. {near}".removesuffix(". ")
        hook = path.removeprefix("default_hooks.")
        if path == f"default_hooks.{hook}" and "." not in hook and "type" not in section:
            named = [p.rpartition(".")[2] for p, *_ in sections if p.startswith("default_hooks.")]
            known = {name: f"default_hooks.{name}" for name in named if name != hook}
            yield f"nothing reads {path}. {_nearest(hook, known) or 'Give it a type'}"


# --- DeepSpeed files ---


_TABLES: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8")
)
HABITS: dict[str, str] = _TABLES["habits"]
"""Names of settings in other programs, and what is meant by them here."""
HONOURED = frozenset(_TABLES["honoured"].split())
"""Keys of a DeepSpeed file that are handed to DeepSpeed as they are."""
CONFIG_DECIDES: dict[str, str] = _TABLES["config_decides"]
"""Keys whose value is the config's, under the name given here."""
DROPPED: dict[str, str] = _TABLES["dropped"]
"""Keys that ask for what this project decides elsewhere."""
REFUSED: dict[str, str] = _TABLES["refused"] | dict.fromkeys(
    _TABLES["not_trained_with"].split(), "GMAI-VL does not train with it. Remove it"
)
"""Keys that would change what is learnt, or that nothing would heed; and what to do instead."""


@dataclass(slots=True)
class Settled:
    """A DeepSpeed file beside a config: what DeepSpeed is given.

    ``overruled`` has a sentence for each key whose value is not taken, ``refused`` for each with which no run
    starts.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    overruled: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def require(self) -> Settled:
        """Return itself; raise ``GMAIError`` if a key is refused, and name all of them."""
        if self.refused:
            raise GMAIError(f"DeepSpeed file {self.name}: " + ". ".join(self.refused))
        return self


def read(name: str, cfg: Mapping[str, Any]) -> Settled:
    """Read the file that ``--deepspeed NAME`` means and settle it beside a training config.

    Raises:
        GMAIError: no such file, or it is not one JSON object.
    """
    from xtuner.configs import cfgs_name_path

    file = Path(name if Path(name).is_file() else cfgs_name_path.get(name, ""))
    if not file.is_file():
        raise GMAIError(
            f"--deepspeed {name}: no such file, and no name that xtuner knows. Give zero1, zero2, zero3, "
            "zero2_offload, zero3_offload or a JSON file"
        )
    try:
        content = STRICT_JSON.decode(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise GMAIError(f"DeepSpeed file {name} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise GMAIError(f"DeepSpeed file {name} must hold one JSON object, not a {type(content)}")
    return settle(name, content, cfg)


def settle(name: str, content: Mapping[str, Any], cfg: Mapping[str, Any]) -> Settled:
    """Decide each key of a DeepSpeed file, which stays as it is, beside a training config."""
    settled = Settled(name)
    for key, value in content.items():
        if key in CONFIG_DECIDES:
            ours = _config_value(key, cfg)
            named = f"{CONFIG_DECIDES[key]}={ours!r}"
            if value not in ("auto", ours):
                settled.overruled.append(f"{key}: {value!r} is not taken, the config has {named}")
        elif key in DROPPED and value != "auto":
            settled.overruled.append(f"{key} is not taken: {DROPPED[key]}")
        elif key in REFUSED:
            _refuse(settled, key, value)
        elif key in HONOURED:
            settled.settings[key] = _without_auto(settled, key, value)
        elif key not in DROPPED:
            known = {name: repr(name) for name in (*HONOURED, *CONFIG_DECIDES, *DROPPED)}
            settled.refused.append(
                f"DeepSpeed reads no {key!r}. {_nearest(key, known) or 'Remove it'}"
            )
    for key in CONFIG_DECIDES:
        settled.settings[key] = "auto"
    # DeepSpeed would wait for the device twice a micro-batch, for a line that it never prints.
    settled.settings.setdefault("timers", {"throughput": {"enabled": False}})
    _settle_precision(settled, content)
    _check_values(settled)
    return settled


def _config_value(key: str, cfg: Mapping[str, Any]) -> Any:
    """Return what xtuner gives DeepSpeed for a key of :data:`CONFIG_DECIDES`."""
    *sections, name = CONFIG_DECIDES[key].split(".")
    for section in sections:
        cfg = cfg.get(section) or {}
    return cfg.get(name, 1)


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

# SPDX-License-Identifier: Apache-2.0

"""Settings that nothing reads: a misspelt key, or another program's name for ours, stops the start.

mmengine and xtuner build what they find and leave the rest; a run of days then has other settings than its
user believes. What a section may hold is read from the signature of what it is passed to. A class that
takes ``**kwargs`` hands them to the class it derives from; where that can't be followed (a class of the
user's own), nothing is said.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from mmengine import registry
from mmengine.runner import FlexibleRunner, set_random_seed
from torch.utils.data import DataLoader
from xtuner.registry import BUILDER

from gmai_xtuner.train.deepspeed_settings import HABITS

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
    # gmai_xtuner/train/trackers.py
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
    if near := get_close_matches(key, known, n=1):
        return f"Did you mean {prefix}{near[0]}?"
    if key in index:
        return f"Did you mean {index[key]}?"
    if prefix:
        return f"Known are {', '.join(sorted(known))}"
    if near := get_close_matches(key, index, n=1, cutoff=0.8):
        return f"Did you mean {index[near[0]]}?"
    return "Remove it, or override the setting that it was meant for"


def _builds_nothing(
    sections: list[tuple[str, Mapping[str, Any], Collection[str] | None]],
) -> Iterator[str]:
    for path, section, _ in sections:
        kind = section.get("type")
        if path and isinstance(kind, str) and _called(kind) is None:
            names = {name for one in _REGISTRIES for name in one.module_dict}
            near = get_close_matches(kind, names, n=1)
            meant = f". Did you mean {near[0]}?" if near else ""
            yield f"{path}.type: nothing is called {kind!r}{meant}"
        hook = path.removeprefix("default_hooks.")
        if path == f"default_hooks.{hook}" and "." not in hook and "type" not in section:
            named = [p.rpartition(".")[2] for p, *_ in sections if p.startswith("default_hooks.")]
            near = get_close_matches(hook, set(named) - {hook}, n=1)
            meant = f"Did you mean default_hooks.{near[0]}?" if near else "Give it a type"
            yield f"nothing reads {path}. {meant}"

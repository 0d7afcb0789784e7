"""Options that nothing reads: a misspelt key stops training late, or is ignored without a word.

What a section may hold is read from the signature of what it is passed to. A class that takes ``**kwargs``
hands them to the class it derives from; where that can't be followed (a class of the user's own), nothing
is said.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from mmengine.registry import (
    DATA_SAMPLERS,
    HOOKS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    Registry,
)
from mmengine.runner import FlexibleRunner, Runner
from torch.utils.data import DataLoader

from gmai_xtuner.preflight.findings import Findings
from gmai_xtuner.preflight.run_config import RunConfig

DATALOADER = frozenset(inspect.signature(DataLoader).parameters) | {
    # mmengine's Runner.build_dataloader takes these out.
    "num_batch_per_epoch",
    "disable_subprocess_warning",
}
TOP_LEVEL = (
    frozenset(inspect.signature(FlexibleRunner).parameters)
    | frozenset(inspect.signature(Runner).parameters)
) - {"cfg"} | {
    "custom_imports",
    "runner_type",
    # xtuner/tools/train.py
    "framework",
    "lora",
    "sequence_parallel",
    "sequence_parallel_size",
    "train_dataset",
    "trainer",
    "training_args",
    "use_varlen_attn",
    # xtuner/tools/model_converters/pth_to_hf.py
    "image_processor",
    "tokenizer",
}
"""Keys of a config that mmengine's runners and xtuner's commands read."""

FOLLOWED = ("gmai_xtuner", "mmengine", "torch", "xtuner")
"""Packages whose classes hand ``**kwargs`` to their base, and take nothing out of them."""


def check_names(run: RunConfig, findings: Findings) -> None:
    """Every key of the config that training would not understand.

    Args:
        run: the run.
        findings: take an unknown argument as a failure, a top-level key that looks misspelt as a warning.
    """
    cfg = run.cfg
    for key in cfg:
        near = get_close_matches(key, TOP_LEVEL, n=1, cutoff=0.8)
        if key not in TOP_LEVEL and near:
            findings.warn(
                "config", f"nothing reads {key!r} in the config. Did you mean {near[0]!r}?"
            )
    for name in ("train_dataloader", "val_dataloader"):
        section = cfg.get(name)
        if isinstance(section, Mapping):
            _compare(name, section, DATALOADER, "DataLoader", findings)
    for path, section, registry, extra in _sections(cfg):
        kind = _class(section.get("type"), registry)
        known = None if kind is None else arguments_of(kind)
        if kind is not None and known is not None:
            _compare(path, section, known | {"type"} | set(extra), kind.__name__, findings)


def arguments_of(kind: type) -> frozenset[str] | None:
    """Names that a class takes; ``None`` if its signature does not tell."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {parameter.name for parameter in parameters if parameter.kind not in kinds}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return frozenset(names)
        if base.__module__.partition(".")[0] not in FOLLOWED:
            return None
    return None


def _sections(cfg: Any) -> Iterator[tuple[str, Mapping[str, Any], Registry, tuple[str, ...]]]:
    """Path, content, registry, and keys that the builder takes out before the class sees them."""
    found: list[tuple[str, Any, Registry, tuple[str, ...]]] = []
    for name in ("train_dataloader", "val_dataloader"):
        loader = cfg.get(name)
        if isinstance(loader, Mapping):
            found += [
                (f"{name}.{part}", loader.get(part), DATA_SAMPLERS, ())
                for part in ("sampler", "batch_sampler")
            ]
    wrapper = cfg.get("optim_wrapper")
    found += [
        ("train_cfg", cfg.get("train_cfg"), LOOPS, ("by_epoch",)),
        ("val_cfg", cfg.get("val_cfg"), LOOPS, ()),
        ("optim_wrapper", wrapper, OPTIM_WRAPPERS, ("constructor", "paramwise_cfg")),
    ]
    if isinstance(wrapper, Mapping):
        found.append(("optim_wrapper.optimizer", wrapper.get("optimizer"), OPTIMIZERS, ()))
    several = (
        ("param_scheduler", PARAM_SCHEDULERS, ("convert_to_iter_based",)),
        ("val_evaluator", METRICS, ()),
        ("custom_hooks", HOOKS, ("priority",)),
    )
    for name, registry, extra in several:
        value = cfg.get(name)
        if isinstance(value, (list, tuple)):
            found += [(f"{name}.{i}", item, registry, extra) for i, item in enumerate(value)]
        else:
            found.append((name, value, registry, extra))
    hooks = cfg.get("default_hooks")
    if isinstance(hooks, Mapping):
        found += [(f"default_hooks.{key}", hooks[key], HOOKS, ("priority",)) for key in hooks]
    return (entry for entry in found if isinstance(entry[1], Mapping))


def _class(kind: Any, registry: Registry) -> type | None:
    if isinstance(kind, str):
        try:
            kind = registry.get(kind)
        # What can't be imported stops the build, which is told where it happens.
        except (ImportError, AttributeError):
            return None
    return kind if isinstance(kind, type) else None


def _compare(
    path: str, section: Mapping[str, Any], known: Iterable[str], taker: str, findings: Findings
) -> None:
    names = sorted(known)
    for key in section:
        if key in names or key == "_delete_":
            continue
        near = get_close_matches(key, names, n=1)
        told = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}"
        findings.fail("config", f"{path}.{key}: {taker} has no such argument. {told}")

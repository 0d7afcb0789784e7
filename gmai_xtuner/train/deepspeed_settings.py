# SPDX-License-Identifier: Apache-2.0

"""DeepSpeed files: every key is honoured, overruled by the config with a line that says so, or refused.

DeepSpeed itself reads some sections behind the config's back (``scheduler`` sets the learning rate), leaves
out others without a word, and finds wrong values only when all weights are loaded. ``xtuner train`` and the
preflight settle a file by :func:`settle` before anything else; the names are those of DeepSpeed 0.16.2
(``deepspeed/runtime/config.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from gmai_xtuner.core.errors import GMAIError

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
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, OSError) as error:
        raise GMAIError(f"DeepSpeed file {name} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise GMAIError(f"DeepSpeed file {name} must hold one JSON object, not a {type(content)}")
    return settle(name, content, cfg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)} stands in it more than once")
    return dict(pairs)


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
            near = get_close_matches(key, [*HONOURED, *CONFIG_DECIDES, *DROPPED], n=1)
            meant = f"Did you mean {near[0]!r}?" if near else "Remove it"
            settled.refused.append(f"DeepSpeed reads no {key!r}. {meant}")
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

# SPDX-License-Identifier: Apache-2.0

"""The patterns of ``rules.yaml``, compiled, by section and name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _sections() -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8")
    )
    return content


def patterns(section: str, **fragments: str) -> dict[str, re.Pattern[str]]:
    """Return name -> pattern of a section.

    In the file a pattern is a text, or several lines that are joined without a space. ``<<name>>`` stands for
    a fragment of the same section or of the arguments; ``name /i`` has the flags i, m or s.
    """
    return _compiled(_sections()[section], fragments)


def _compiled(section: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    fragments = dict(given)
    found = {}
    for key, value in section.items():
        text = value.replace("\n", "")
        while "<<" in text:
            text = re.sub(r"<<(\w+)>>", lambda match: fragments[match[1]], text)
        if key.startswith("<<"):
            fragments[key.strip("<>")] = text
            continue
        name, _, flags = key.partition(" /")
        found[name] = re.compile(f"(?{flags}){text}" if flags else text)
    return found

# SPDX-License-Identifier: Apache-2.0

"""docs/readers.md is what the options say themselves: ``python -m tests.data_tools.test_readers_page``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from data_tools import readers
from data_tools.job import _models
from data_tools.readers import SourceOptions

PAGE = Path(__file__).parents[2] / "docs/readers.md"
CORPUS = PAGE.with_name("corpus.md").read_text(encoding="utf-8")
HEAD = """# Every key of every reader

Made from the options' own definitions; [corpus.md](corpus.md#sources) says how they work together.
"""


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """Key -> what its class, or one that it inherits from, says of it under ``Args``."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        _, _, rows = inspect.cleandoc(owner.__doc__ or "").partition("Args:\n")
        rows = textwrap.dedent(rows).split("\n\n")[0]
        for row in re.split(r"\n(?=\S)", rows) if owner is not BaseModel else ():
            names, _, text = row.partition(": ")
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def section(title: str, options: type[BaseModel], without: type[BaseModel]) -> Iterator[str]:
    own = {key: f for key, f in options.model_fields.items() if key not in without.model_fields}
    own.pop("reader", None)
    if not own:
        return
    yield f"\n## {title}\n\n| key | default | meaning |\n| --- | --- | --- |"
    told = meanings(options)
    for key, field in own.items():
        default = field.get_default(call_default_factory=True)
        known = default is None or isinstance(default, str | int | float | tuple | dict)
        shown = f"`{default!r}`" if known else "see below"
        shown = "required" if default is PydanticUndefined else shown
        assert key in told or f"`{key}" in CORPUS or f"`{key}:" in CORPUS or f"{key}:" in CORPUS, (
            key
        )
        meaning = told.get(key, "see [corpus.md](corpus.md#sources)").replace("|", r"\|")
        yield f"| `{key}` | {shown} | {meaning} |"


def page() -> str:
    lines = [HEAD.rstrip(), *section("All readers", SourceOptions, BaseModel)]
    nested: dict[str, type[BaseModel]] = {}
    for name in readers.READERS:
        options = readers.load(name).Options
        if name != "decathlon":
            lines += section(
                "`nnunet`, `decathlon`" if name == "nnunet" else f"`{name}`", options, SourceOptions
            )
        for field in options.model_fields.values():
            nested |= {one.__name__: one for one in _models(field.annotation)}
    for name, one in sorted(nested.items()):
        keys = ", ".join(f"`{key}`" for key in one.model_fields)
        lines.append(
            f"\n## Section {name}\n\n{inspect.cleandoc(one.__doc__ or '').splitlines()[0]} Keys: {keys}.\n"
        )
        told = meanings(one)
        lines += [f"- `{key}`: {told[key]}" for key in one.model_fields if key in told]
    return "\n".join(lines) + "\n"


def test_the_page_says_every_key_of_every_reader():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

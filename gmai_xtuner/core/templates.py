# SPDX-License-Identifier: Apache-2.0

"""Jinja templates that lie beside the modules of a package."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(
    package: str, folder: str = ".", *, html: bool = False, **options: Any
) -> Environment:
    """Return an environment in which a missing value is an error, and tags leave no blank lines behind.

    ``package`` is what the templates travel with; with ``html`` every value is escaped.
    """
    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )

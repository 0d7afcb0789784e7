# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import yaml


def tables(file: str) -> Any:
    """The tables of inputs and results of a test file, out of the YAML file beside it of the same name."""
    return yaml.safe_load(Path(file).with_suffix(".yaml").read_text(encoding="utf-8"))

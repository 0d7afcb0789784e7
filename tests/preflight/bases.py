# SPDX-License-Identifier: Apache-2.0

"""Base folders that hold a ``config.json`` each and no weights."""

import json
import shutil
from pathlib import Path

from tests.tables import tables

TABLES = tables(__file__)

INTERNLM2_5_7B = TABLES["INTERNLM2_5_7B"]
CLIP_VIT_L_14_336 = TABLES["CLIP_VIT_L_14_336"]


def write_true_geometry(folder: Path, *, tiny: Path | None = None) -> None:
    """Write ``folder/llm`` and ``folder/vision``.

    Args:
        folder: is made.
        tiny: tiny bases whose tokenizer and image processor are put beside the configs, so that data can
            be planned.
    """
    for part, config in (("llm", INTERNLM2_5_7B), ("vision", CLIP_VIT_L_14_336)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
            if tiny is not None and (tiny / part / name).is_file():
                shutil.copy(tiny / part / name, folder / part / name)

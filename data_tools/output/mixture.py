"""The files by which a training takes the corpus: ``mixture.yaml``, and ``held_out.yaml`` for evaluation.

Categories and ratios are those of the paper's own sub-datasets (GMAI-VL, arXiv 2411.14522, table 7):
text without a picture is seen in stage 3 only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from data_tools.output.corpus_files import CONVERSATION_FILES, HELD_OUT

CATEGORIES = {
    "caption.jsonl": "Medical Captioning",
    "instruct.jsonl": "Medical Instruction",
    "percept.jsonl": "Medical Instruction",
    "text_single.jsonl": "Medical Text",
    "text_multi.jsonl": "Medical Text",
}
_WITH_IMAGES = {"stage1": 1, "stage2": 1, "stage3": 1}
_TEXT = {"stage1": 0, "stage2": 0, "stage3": 1}


def write(folder: Path, *, title: str, lines: dict[str, int]) -> None:
    """Write ``mixture.yaml`` of the training files and ``held_out.yaml`` of the held-out ones.

    Args:
        folder: where the corpus is being written.
        title: of the corpus; dataset names begin with it, so that several corpora can be put into one
            mixture.
        lines: conversations in each file, named below the folder; only these files are listed, and
            a mixture without any isn't written.
    """
    short = "-".join(re.findall(r"\w+", title.lower())) or "corpus"
    for name, prefix, what in (
        ("mixture.yaml", "", "for training; copy its datasets into a larger mixture as they are"),
        ("held_out.yaml", f"{HELD_OUT}/", "held out: never to be trained on"),
    ):
        datasets = {
            f"{short}-{Path(file).stem.replace('_', '-')}": _dataset(file, prefix, lines)
            for file in CONVERSATION_FILES
            if lines.get(prefix + file)
        }
        if datasets:
            text = yaml.safe_dump({"datasets": datasets}, sort_keys=False, allow_unicode=True)
            (folder / name).write_text(f"# Conversations {what}.\n{text}", encoding="utf-8")


def _dataset(file: str, prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    text = file.startswith("text_")
    return {
        "annotations": prefix + file,
        **({} if text else {"image_root": "."}),
        "category": CATEGORIES[file],
        "quality": "high",
        "ratio": dict(_TEXT if text else _WITH_IMAGES),
        "size": lines[prefix + file],
    }

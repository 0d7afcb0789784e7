"""Which folder a comparison goes to: one of its own, so that no list of another benchmark is written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gmai_xtuner.core.errors import CorpusError

MARK = "overlap.json"
"""Written first of all files: a folder with it is a comparison's."""


def default_folder(benchmark: Path) -> Path:
    """``overlap/<name of the benchmark's folder or file>``, below the working directory."""
    whole = benchmark.resolve()
    return Path("overlap") / (whole.name if whole.is_dir() else whole.stem)


def seen_from(folder: Path, path: Path) -> str:
    """A path as the folder sees it: the same wherever the command is called, and when both are moved."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_folder(folder: Path, corpus: Path, benchmark: Path) -> None:
    """Refuse a folder that another comparison, or something else, has its files in.

    Args:
        folder: where the result is to go; it need not exist.
        corpus, benchmark: what is compared.

    Raises:
        CorpusError: no folder, a folder of something else, or of another corpus or benchmark.
    """
    remedy = "Give another folder with --output."
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CorpusError(f"--output {folder} is a file; a folder was expected. {remedy}")
    mark = folder / MARK
    if not mark.is_file():
        # near.tsv alone: decisions that were carried over. Hidden: of a run that was killed.
        others = sorted(
            path.name
            for path in folder.iterdir()
            if path.name != "near.tsv" and not path.name.startswith(".")
        )
        if others:
            told = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise CorpusError(
                f"--output {folder} is not empty and no folder of a comparison ({told}). {remedy}"
            )
        return
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        for side, now in (("corpus", corpus), ("benchmark", benchmark)):
            before = Path(found[side]["path"])
            seen = found[side].get("seen_from_here")
            if seen != seen_from(folder, now) and before.resolve() != now.resolve():
                raise CorpusError(
                    f"--output {folder} holds the comparison with another {side}: {before}, now {now}. Its "
                    f"exclude.txt and near.tsv would be lost. {remedy} A mixture's `exclude` takes a list of "
                    "files."
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"--output {folder}: its {MARK} is not of this command ({type(error).__name__}: {error}). "
            f"{remedy}"
        ) from error

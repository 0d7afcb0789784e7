"""A new corpus takes the place of the old one, whole, whenever the run is killed.

Everything is written to ``.work/corpus.new``; its renaming to ``.work/corpus.ready`` is the moment from which
the new corpus holds. Then its files are moved to where they belong. ``mixture.yaml`` and
``held_out.yaml``, by which a training finds the corpus, are taken away before the first file is moved and
put back after the last. So a kill leaves

- before that moment: the old corpus, untouched;
- after it: the new corpus, or, for the milliseconds in between, a folder that no training can start on and
  that `recover` completes from ``corpus.ready``, which every run calls first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = ".work"
ENTRIES = ("mixture.yaml", "held_out.yaml")
_PLAN = ".plan.json"
_INSTALLED = "corpus.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write the new corpus to; it takes the old one's place if the block ends well.

    Args:
        folder: of the corpus; pictures and ``.work`` in it are left alone.
    """
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    recover(folder)
    new = work / "corpus.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    yield new
    names = sorted(path.name for path in new.iterdir())
    (new / _PLAN).write_text(json.dumps(names), encoding="utf-8")
    for path in sorted(new.rglob("*"), reverse=True):
        _flush(path)
    _flush(new)
    os.rename(new, work / "corpus.ready")
    _flush(work)
    recover(folder)


def recover(folder: Path) -> bool:
    """Put a corpus that was complete when its run was killed where it belongs; True if there was one."""
    work = folder / WORK
    ready = work / "corpus.ready"
    if not (ready / _PLAN).is_file():
        return False
    names = json.loads((ready / _PLAN).read_text(encoding="utf-8"))
    installed = work / _INSTALLED
    old = json.loads(installed.read_text(encoding="utf-8")) if installed.is_file() else []
    for name in ENTRIES:
        if (ready / name).exists() or name not in names:
            (folder / name).unlink(missing_ok=True)
    _flush(folder)
    for name in sorted(set(old) - set(names)):
        _remove(folder / name)
    _write_aside(installed, json.dumps(sorted({*old, *names})))
    for name in sorted(names, key=lambda name: (name in ENTRIES, name)):
        if (ready / name).exists():
            if (folder / name).is_dir() or (ready / name).is_dir():
                _remove(folder / name)
            if name in ENTRIES:
                _flush(folder)
            os.replace(ready / name, folder / name)
    _flush(folder)
    _write_aside(installed, json.dumps(names))
    (ready / _PLAN).unlink()
    ready.rmdir()
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    os.replace(aside, path)


def _flush(path: Path) -> None:
    """Until this returns, a power cut could undo what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

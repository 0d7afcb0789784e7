# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import pytest

from data_tools.output import build
from data_tools.output.build import recover, replacing

OLD = {
    "mixture.yaml": "old",
    "caption.jsonl": "old",
    "percept.jsonl": "old",
    "figures/a.png": "old",
}
NEW = {
    "mixture.yaml": "new",
    "held_out.yaml": "new",
    "caption.jsonl": "new",
    "figures/b.png": "new",
    "held_out/caption.jsonl": "new",
}
KEPT = {"images/ab/x.png": "picture", "notes.txt": "of the user"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Everything but the work folder."""
    return {
        name: path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(folder))).startswith(".work")
    }


def publish_files(folder: Path, files: dict[str, str]) -> None:
    with replacing(folder) as new:
        fill(new, files)


def test_a_new_corpus_replaces_the_old_one_and_nothing_else(tmp_path):
    fill(tmp_path, KEPT)
    publish_files(tmp_path, OLD)
    assert contents(tmp_path) == OLD | KEPT
    publish_files(tmp_path, NEW)
    assert contents(tmp_path) == NEW | KEPT
    assert [path.name for path in (tmp_path / ".work").iterdir()] == ["corpus.json"]
    assert not recover(tmp_path)


def test_an_error_leaves_the_old_corpus(tmp_path):
    publish_files(tmp_path, OLD)

    def fail(folder: Path) -> None:
        with replacing(folder) as new:
            fill(new, NEW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tmp_path)
    assert contents(tmp_path) == OLD
    publish_files(tmp_path, NEW)
    assert contents(tmp_path) == NEW


def test_a_kill_at_any_step_leaves_the_old_the_new_or_what_cannot_be_trained_on(
    tmp_path, monkeypatch
):
    """Stop at the first, second, third ... change of the file system, then run again."""
    changes = [(os, "rename"), (os, "replace"), (Path, "unlink"), (Path, "rmdir"), (Path, "mkdir")]
    changes += [(Path, "write_text"), (Path, "write_bytes"), (build.shutil, "rmtree")]
    changes += [(build, "to_disk"), (build, "directory_to_disk"), (build, "replace_text")]
    originals = [getattr(*change) for change in changes]
    states: list[str] = []
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        fill(folder, KEPT)
        publish_files(folder, OLD)
        left = [steps]

        def wrapped(original, left=left):
            def step(*arguments, **options):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return original(*arguments, **options)

            return step

        with monkeypatch.context() as patched:
            for (where, name), original in zip(changes, originals, strict=True):
                patched.setattr(where, name, wrapped(original))
            try:
                with replacing(folder) as new:
                    for name, text in NEW.items():  # not counted: before the moment in any case
                        os.makedirs((new / name).parent, exist_ok=True)
                        with open(new / name, "w") as file:
                            file.write(text)
                break
            except Killed:
                pass
        found = contents(folder)
        whole = {"old": OLD | KEPT, "new": NEW | KEPT}
        state = next((name for name, files in whole.items() if found == files), "between")
        states.append(state)
        if state == "between":
            assert not {"mixture.yaml"} & set(found)
            assert recover(folder)
            assert contents(folder) == NEW | KEPT
        else:
            recover(folder)
            assert contents(folder) in whole.values()
        assert {name: text for name, text in found.items() if name in KEPT} == KEPT
        publish_files(folder, NEW)
        assert contents(folder) == NEW | KEPT
        steps += 1
    assert states[0] == "old"
    assert states[-1] == "new"
    assert "between" in states
    assert states == sorted(states, key=["old", "between", "new"].index)


def test_the_first_corpus_of_a_folder_that_does_not_exist(tmp_path):
    publish_files(tmp_path / "a" / "b", NEW)
    assert contents(tmp_path / "a" / "b") == NEW

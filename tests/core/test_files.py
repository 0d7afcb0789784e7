# SPDX-License-Identifier: Apache-2.0

import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmai_xtuner.core import files
from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.exclusion import Exclusion, Named, read_exclusions, read_list
from gmai_xtuner.core.files import (
    keep_first,
    locked,
    remove_left_behind,
    replace_text,
    staged,
    staging,
)
from gmai_xtuner.core.mixture import DatasetEntry, load_mixture


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_the_old_content_stays_until_the_new_one_is_whole(tmp_path, durable):
    file = tmp_path / "a.txt"
    replace_text(file, "old", durable=durable)
    with staged(file, durable=durable) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    replace_text(file, "größer", durable=durable)
    assert file.read_bytes() == "größer".encode()
    assert names(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def stopped():
        with staged(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(OSError, match="taken"), staged(tmp_path / "taken") as partial:
        (partial / "deep").mkdir(parents=True)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt", "taken"]


def test_the_longest_name_that_a_file_may_have(tmp_path):
    for name in ("a" * 255, "a" * 254 + "b", "胸" * 85):
        replace_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len({staging(tmp_path / name).name for name in names(tmp_path)}) == 3


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "a").write_text("a")
    assert (tmp_path / "out" / "deep" / "a").read_text() == "a"
    assert names(tmp_path) == ["out"]


def test_only_what_killed_processes_of_this_machine_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    (tmp_path / f".cache.{host}.{dead.pid}.partial").mkdir()
    (tmp_path / f".cache.{host}.{dead.pid}.partial" / "file").touch()
    (tmp_path / f".other.{host}.{dead.pid}.partial").touch()
    (tmp_path / f".cache.elsewhere.{dead.pid}.partial").mkdir()
    staging(tmp_path / "cache").mkdir()
    kept = [".cache.elsewhere", f".cache.{host}.{os.getpid()}", f".other.{host}"]
    remove_left_behind(tmp_path / "cache")
    assert len(names(tmp_path)) == 3
    assert all(any(name.startswith(k) for name in names(tmp_path)) for k in kept)


def test_the_first_of_two_builds_of_the_same_stays(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(name)
        keep_first(tmp_path / name, tmp_path / "cache")
    assert names(tmp_path) == ["cache"]
    assert (tmp_path / "cache" / "meta.json").read_text() == "first"
    (tmp_path / "third").mkdir()
    (tmp_path / "cache" / "meta.json").rename(tmp_path / "cache" / "something else")
    with pytest.raises(OSError, match="not empty"):
        keep_first(tmp_path / "third", tmp_path / "cache")


def hold(path, held):
    with locked(path, "hold"):
        held.set()
        time.sleep(1)


def test_who_waits_for_a_lock_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "MINUTES_BETWEEN_NOTES", 0.2 / 60)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lock", held))
    process.start()
    held.wait(10)
    with caplog.at_level(logging.INFO), locked(tmp_path / "lock", "read a.jsonl"):
        pass
    process.join()
    assert "Waiting for another process to read a.jsonl" in caplog.text


# --- Exclude lists: the meaning of their lines, and the datasets that each concerns ---


def test_lines_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "\ufeff# a comment\n\n  id: 2d#cls#ct: a b.png \nimage: ./scans//a.png\r\ndataset: x: y\n"
        'id: "two\\nlines"\ndataset: *\nimage: ä.png\n',
        encoding="utf-8",
    )
    assert read_list(path) == [
        Named("id", "2d#cls#ct: a b.png", None),
        Named("image", "scans/a.png", None),
        Named("id", "two\nlines", "x: y"),
        Named("image", "ä.png", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: 1\n4711\n", r"list\.txt, line 2: expected 'id: \.\.\.', .* got '4711'"),
        ("ids: 1", r"line 1: expected"),
        ("image:", r"line 1: expected"),
        ('id: "open', r"line 1: .* is no JSON text"),
    ],
)
def test_a_line_that_means_nothing_is_refused_with_its_number(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(MixtureError, match=message):
        read_list(tmp_path / "list.txt")


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match=r"exclude list .*none\.txt can't be read"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("id: ä".encode("latin-1"))
    with pytest.raises(MixtureError, match=r"latin\.txt is not UTF-8"):
        read_list(tmp_path / "latin.txt")


def entry(name: str, *exclude: Path) -> DatasetEntry:
    return DatasetEntry(name, (), None, None, None, {}, "cut", None, None, exclude)


def test_a_name_for_all_is_known_if_one_dataset_has_it(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "id: a\nid: z\ndataset: two\nid: a\nid: b\ndataset: off\nid: 1\ndataset: no\nid: 2\n"
    )
    read = read_exclusions([entry("one", path), entry("two", path)], known={"one", "two", "off"})
    assert [sorted(part.ids) for part in read.datasets] == [["a", "z"], ["a", "b", "z"]]
    found = [Exclusion(frozenset({"a"})), Exclusion()]
    assert read.unknown(found) == ["id: 2 (no)", "id: b (two)", "id: z"]


def test_a_list_of_one_dataset_concerns_no_other(tmp_path: Path) -> None:
    own, both = tmp_path / "own.txt", tmp_path / "both.txt"
    own.write_text("id: 7\nimage: 0.png\ndataset: one\nid: 8\n")
    both.write_text("dataset: one\nid: 9\n")
    read = read_exclusions([entry("one", both), entry("two", own, both)], known={"one", "two"})
    assert read.datasets == (
        Exclusion(frozenset({"9"})),
        Exclusion(frozenset({"7"}), frozenset({"0.png"})),
    )
    assert read.unknown([Exclusion(), Exclusion()]) == [
        "id: 7 (two)", "id: 9 (one)", "image: 0.png (two)",
    ]  # fmt: skip


def test_order_and_repetition_of_lines_change_no_digest(tmp_path: Path) -> None:
    first, again = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("id: c2\nid: b4\ndataset: gone\nid: 1\n")
    again.write_text("# again\nid: b4\nid: c2\nid: b4\ndataset: gone\nid: 1\n")
    one, other = (read_exclusions([entry("d", path)], known={"d"}) for path in (first, again))
    # Known since the first version: plans made by it are found again.
    assert one.digest == other.digest == "80d93fd622f30f47"
    first.write_text("id: c2\nid: b4\n")
    assert read_exclusions([entry("d", first)], known={"d"}).digest != one.digest


def test_a_list_that_does_not_exist_is_an_error_of_the_mixture(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets:\n  d: {annotations: a.jsonl}\nexclude: gone.txt\n")
    with pytest.raises(MixtureError, match=r"mixture\.yaml:3: .*exclude 'gone.txt' does not exist"):
        load_mixture(mixture)
    (entry,) = load_mixture(mixture, check_files=False).entries
    assert entry.exclude == (tmp_path / "gone.txt",)

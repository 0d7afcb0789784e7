# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from gmai_xtuner.core import files
from gmai_xtuner.core.files import (
    keep_first,
    locked,
    remove_left_behind,
    replace_text,
    staged,
    staging,
)


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

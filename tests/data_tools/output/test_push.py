# SPDX-License-Identifier: Apache-2.0

"""Uploading, and what is never uploaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects

from data_tools.generate import main


class Hub:
    """Stands for `HfApi`: repositories by name, private or not, and the files of the one asked for."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, *, private: bool, **_: Any) -> None:
        self.private.setdefault(name, private)

    def dataset_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[name])

    def upload_folder(
        self,
        *,
        folder_path: Path,
        allow_patterns: list[str],
        delete_patterns: list[str],
        **more: Any,
    ) -> SimpleNamespace:
        for name in list(filter_repo_objects(self.files, allow_patterns=delete_patterns)):
            del self.files[name]
        found = (str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file())
        for name in filter_repo_objects(found, allow_patterns=allow_patterns):
            self.files[name] = (folder_path / name).read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{more['repo_type']}/{more['repo_id']}")


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


OPEN = {"publishable": True, "parquet": True, "held_out": 0.3}


def test_the_hub_has_the_corpus_and_nothing_else(hub, classes, make_job, tmp_path, capsys):
    job, out = make_job({}, corpus=OPEN), tmp_path / "out"
    assert main([str(job)]) == 0
    hub.files["caption-00007.parquet"] = b"of an older corpus"
    hub.files["notes.md"] = b"of its owner"
    shards = list(out.rglob("*.parquet"))
    for name in ("mine.parquet", ".work/caption-00000.parquet"):
        (out / name).write_bytes(b"of the user")
    assert main([str(job), "--push", "ward/cells"]) == 0
    assert "uploaded: https://hub/dataset/ward/cells" in capsys.readouterr().out
    named = [out / "README.md", out / "summary.json", *shards, *out.glob("figures/*")]
    assert hub.files == {
        "notes.md": b"of its owner",
        **{str(file.relative_to(out)): file.read_bytes() for file in named},
    }
    assert any("held_out" in file.parts for file in shards)
    assert hub.private == {"ward/cells": True}

    hub.private["ward/cells"] = False
    assert main([str(job), "--push", "ward/cells"]) == 1
    assert "ward/cells is public. Add --public" in capsys.readouterr().err
    assert main([str(job), "--push", "ward/cells", "--public"]) == 0


@pytest.mark.parametrize(
    ("source", "corpus", "told"),
    [
        ({}, {"parquet": True}, "Set corpus: {publishable: true, parquet: true}"),
        ({}, {"publishable": True}, "Set corpus: {publishable: true, parquet: true}"),
        (
            {"licence": "ask Anna"},
            OPEN,
            "holds what may not be published: cells: the licence 'ask Anna'",
        ),
        ({"name": "other"}, OPEN, "cells, which is no source of the job"),
    ],
)
def test_what_the_job_keeps_back_now_is_not_sent(
    hub, classes, make_job, capsys, source, corpus, told
):
    assert main([str(make_job({"name": "cells"}, corpus=OPEN))]) == 0
    assert main([str(make_job({"name": "cells"} | source, corpus=corpus)), "--push", "a/b"]) == 1
    assert told in capsys.readouterr().err
    assert (hub.private, hub.files) == ({}, {})


def test_a_corpus_that_was_changed_is_not_sent(hub, classes, make_job, tmp_path, capsys):
    job = make_job({}, corpus=OPEN)
    assert main([str(job)]) == 0
    next((tmp_path / "out/images").rglob("*.*")).write_bytes(b"another")
    assert main([str(job), "--push", "a/b"]) == 1
    assert "is not as its manifest says" in capsys.readouterr().err
    assert (hub.private, hub.files) == ({}, {})


def test_a_hub_that_refuses_is_one_error(hub, classes, make_job, monkeypatch, capsys):
    job = make_job({}, corpus=OPEN)
    assert main([str(job)]) == 0
    capsys.readouterr()

    def refuse(*_: object, **__: object) -> None:
        raise HFValidationError("no such name")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert main([str(job), "--push", "a/b"]) == 1
    assert capsys.readouterr().err.startswith("error: a/b can't be written: no such name")

# SPDX-License-Identifier: Apache-2.0

"""The manifest reconciles with the folder, and every change of the folder is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.generate import main


@pytest.fixture
def built(classes, make_job, tmp_path) -> Path:
    assert main([str(make_job({"licence": "ask Anna"}, corpus={"held_out": 0.3}))]) == 0
    return tmp_path / "out"


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("".join(f"{line}\n" for line in change(lines)))

    return made


def images(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "images").rglob("*") if path.is_file())


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (edit("caption.jsonl", lambda x: [x[0].replace("gpt", "GPT"), *x[1:]]), "differs"),
    "missing": (edit("caption.jsonl", lambda lines: lines[1:]), "of the manifest is missing"),
    "added": (edit("percept.jsonl", lambda x: [*x, '{"id": "new"}']), "not in the manifest"),
    "twice": (edit("percept.jsonl", lambda lines: [*lines, lines[0]]), "is there twice"),
    "record": (edit("records.jsonl", lambda lines: [*lines, "[]"]), "no record"),
    "broken": (edit("instruct.jsonl", lambda lines: [*lines, "{"]), "no conversation"),
    "image changed": (lambda f: images(f)[0].write_bytes(b"x"), "differs from the manifest"),
    "image missing": (lambda f: images(f)[0].unlink(), "missing"),
    "image added": (
        lambda f: (f / "images" / "x.png").write_bytes(b"x"),
        "neither in the manifest",
    ),
}


@pytest.mark.parametrize(("fault", "told"), FAULTS.values(), ids=list(FAULTS))
def test_every_fault_is_found_and_nothing_else(built, capsys, fault, told):
    capsys.readouterr()
    assert main(["--verify", str(built), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["differences"] == []
    fault(built)
    assert main(["--verify", str(built), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert len(found) == 1
    assert told in found[0]


def test_a_row_says_what_is_known_and_null_for_the_rest(built):
    rows = pq.read_table(built / "manifest.parquet").to_pylist()
    files = {row["file"] for row in rows}
    count = sum(len((built / name).read_text().splitlines()) for name in files)
    assert len(rows) == count > 20
    assert any(name.startswith("held_out/") for name in files)
    row = next(row for row in rows if row["form"] == "caption")
    assert (row["licence"], row["may_be_published"], row["writer"]) == (
        "ask Anna",
        False,
        "template",
    )
    assert row["labels"]
    assert "agreement" in row["checks"]
    for name in ("dataset_version", "model", "model_version", "prompt_version", "review_verdict"):
        assert row[name] is None
    assert row["deidentification_method"] is None
    assert all((row["image"] is None) == row["form"].startswith("text_") for row in rows)


def test_a_folder_without_a_manifest_is_one_error(tmp_path, capsys):
    assert main(["--verify", str(tmp_path)]) == 1
    assert "has no manifest.parquet" in capsys.readouterr().err
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 cut")
    assert main(["--verify", str(tmp_path)]) == 1
    assert "not a readable Parquet file" in capsys.readouterr().err
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "manifest.parquet")
    assert main(["--verify", str(tmp_path)]) == 1
    assert "lacks the columns" in capsys.readouterr().err


def test_mlcroissant_accepts_and_reads_it(built):
    mlcroissant = pytest.importorskip("mlcroissant")
    dataset = mlcroissant.Dataset(jsonld=built / "croissant.json")
    assert not dataset.metadata.ctx.issues.errors
    values = json.loads((built / "croissant.json").read_text())
    assert values["rai:personalSensitiveInformation"].endswith("May not be published: tissue.")
    first = next(iter(dataset.records("conversations")))
    assert first["conversations/licence"] == b"ask Anna"

# SPDX-License-Identifier: Apache-2.0

"""The quickstart's driver and report on made-up logs: nothing is trained here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import report
import run
from PIL import Image


def write_log(stage_dir: Path, losses: list[float], *, start: str = "20260101_000000") -> None:
    folder = stage_dir / start / "vis_data"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"loss": loss, "lr": 1e-3, "iter": 5 * (n + 1), "step": 5 * (n + 1)})
        for n, loss in enumerate(losses)
    ]
    lines.insert(1, json.dumps({"tokens_per_second": 10.0, "step": 5}))
    (folder / "scalars.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def heldout_records() -> list[dict]:
    records = []
    for number, (modality, answer, prediction) in enumerate(
        [("ct", "CT", "CT."), ("mr", "MRI", "CT"), ("ct", "CT", " ct"), ("mr", "MRI", "MRI")]
    ):
        records.append(
            {
                "id": f"2d#cls#{modality}#some#heldout#{modality}#{number}.png",
                "image": f"heldout/{modality}/{number}.png",
                "question": "Name the imaging modality.",
                "answer": answer,
                "prediction": prediction,
            }
        )
    return records


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A work dir as a run leaves it."""
    write_log(tmp_path / "stage1", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    write_log(tmp_path / "stage2", [2.0, 1.0])
    write_log(tmp_path / "stage3", [9.0])
    (tmp_path / "stage3" / "last_checkpoint").write_text("some/iter_7.pth", encoding="utf-8")
    timings = {"bases": 1.0, "stage1": 10.0, "stage2": 20.0, "stage3": 30.0}
    (tmp_path / "timings.json").write_text(json.dumps(timings), encoding="utf-8")
    lines = [json.dumps(record) + "\n" for record in heldout_records()]
    (tmp_path / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    for record in heldout_records():
        path = tmp_path / "corpus" / "images" / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "gray").save(path)
    return tmp_path


def test_report_has_each_stage_the_accuracy_and_chance(finished, capsys):
    written = report.write_report(finished)
    assert written == json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert written["stages"]["stage1_shallow"] == {
        "loss_first": 5.0,
        "loss_last": 1.0,
        "iterations": 35,
        "seconds": 10.0,
    }
    assert written["stages"]["stage2_deep"]["loss_first"] == 2.0
    assert written["stages"]["stage2_deep"]["loss_last"] == 1.0
    assert written["stages"]["stage3_instruct"]["loss_last"] == 9.0
    assert written["stages"]["stage3_instruct"]["iterations"] == 7
    assert (written["heldout_accuracy"], written["chance"], written["seconds"]) == (0.75, 0.5, 61.0)
    assert [record["correct"] for record in written["heldout"]] == [True, False, True, True]
    table = capsys.readouterr().out
    assert "stage1_shallow         5.000       1.000          35       10" in table
    assert "wrong: MRI" in table
    with Image.open(finished / "answers.png") as picture:
        assert picture.width > 800


def test_a_resumed_run_continues_its_log(tmp_path):
    write_log(tmp_path, [3.0, 2.0, 1.0])
    write_log(tmp_path, [3.0, 0.5], start="20260101_000100")  # from its second entry on
    assert report.read_losses(tmp_path) == [(5, 3.0), (10, 0.5), (15, 1.0)]


def test_a_stage_without_a_log_is_an_error(finished, capsys):
    (next((finished / "stage2").glob("*/vis_data")) / "scalars.json").unlink()
    assert report.main([str(finished)]) == 1
    assert "the stage did not train" in capsys.readouterr().err


def test_chance_counts_each_wording_by_itself():
    pairs = [("a?", "x"), ("a?", "y"), ("b?", "y"), ("b?", "Y.")]
    assert report.chance_level(pairs) == 0.75


def test_a_command_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(run.StepError, match="make env"):
        run.run_command(["no-such-tool"], tmp_path / "x.log", environment={"PATH": str(tmp_path)})


def test_children_find_this_python_first_and_no_hub(tmp_path):
    environment = run.child_environment(tmp_path)
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_settings_of_a_stage_have_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OVERRIDES", {"all": {"a.b": 1, "c": 2}, "stage1": {"c": False}})
    assert run.train_command(tmp_path)[-3:] == ["a.b=1", "c=2", "stage1.c=False"]


def test_a_training_that_does_not_finish_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run_step", lambda *_: None)
    monkeypatch.setattr(run, "train_command", lambda _: ["python", "-c", "raise SystemExit(3)"])
    with pytest.raises(run.StepError, match="gmai-train ended with code 3"):
        run.run(tmp_path / "new")

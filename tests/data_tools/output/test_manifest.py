# SPDX-License-Identifier: Apache-2.0

"""The manifest reconciles with the folder, and every change of the folder is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.generate import main
from data_tools.items import FORMS, Problem
from data_tools.output import review
from data_tools.output.files import CorpusFiles, conversation_line, rejected_line
from data_tools.records import Label
from data_tools.store import StoredConversation
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.output.fake_store import kept, record, rejected


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
    assert row["deidentification_method"] == "pixels alone; names of files kept"
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


# --- The review: a blinded page in a browser, its verdicts, and the error rate in card and report ---


@pytest.fixture
def corpus(classes, make_job, tmp_path):
    job = make_job({}, make={"caption": 2, "perception": 2, "chinese": 0}, corpus={"held_out": 0})
    assert main([str(job)]) == 0
    return job, tmp_path / "out"


def test_wilson():
    assert review.wilson(0.1, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert review.wilson(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)


def test_verdicts_become_the_error_rate(corpus, tmp_path):
    job, out = corpus
    assert main([str(job), "--review", "12"]) == 0
    page = (out / "review.html").read_text(encoding="utf-8")
    keys = page.split('data-key="')[1:]
    keys = [part.split('"')[0] for part in keys]
    assert len(set(keys)) == len(keys) == 12
    for hidden in ("tissue", "CC BY 4.0", "image 1.png", "annotated"):
        assert hidden not in page
    verdicts = [{"key": key, "verdict": "right"} for key in keys[:10]]
    verdicts += [
        {"key": keys[10], "verdict": "wrong", "what": "side"},
        {"key": keys[11], "verdict": "unclear"},
    ]
    file = tmp_path / "verdicts.json"
    file.write_text(
        json.dumps({"reviewer": "A", "verdicts": [*verdicts, {"key": "0", "verdict": "right"}]})
    )
    assert main([str(job), "--verdicts", str(file)]) == 0
    found = json.loads((out / "summary.json").read_text())["review"]
    assert (found["judged"], found["wrong"], found["unclear"], found["outdated"]) == (11, 1, 1, 1)
    assert 0 < found["low"] < found["error_rate"] < found["high"] < 0.6
    for name in ("README.md", "report.html"):
        assert "people judged 11" in (out / name).read_text().lower()


def test_a_file_that_is_no_review_changes_nothing(corpus, tmp_path):
    _, out = corpus
    file = tmp_path / "verdicts.json"
    for text in ("{}", '{"reviewer": "A", "verdicts": [{"key": "x", "verdict": "fine"}]}', "["):
        file.write_text(text)
        with pytest.raises(CorpusError, match="Nothing was taken in"):
            review.take(out, [file])
    assert not (out / review.VERDICTS).exists()


@pytest.mark.slow
def test_the_browser_saves_what_was_clicked(browser, corpus, tmp_path):
    job, out = corpus
    assert main([str(job), "--review", "4"]) == 0
    page = browser.new_page()
    page.goto((out / "review.html").as_uri())
    page.fill("#reviewer", "B")
    page.locator("article").nth(1).locator("input[value=wrong]").check()
    page.locator("article").nth(1).locator("select").select_option("side")
    with page.expect_download() as saved:
        page.click("#save")
    saved.value.save_as(tmp_path / "saved.json")
    (verdict,) = json.loads((tmp_path / "saved.json").read_text())["verdicts"]
    assert (verdict["verdict"], verdict["what"]) == ("wrong", "side")
    assert review.take(out, [tmp_path / "saved.json"]) == 1


ODD = 'quote " slash \\ line\nbreak tab\t 中文 \u202e\u2028 é \x00 𝄞'


def test_a_conversation_has_the_authors_keys_and_nothing_else():
    line = conversation_line(kept(record(7), "caption"))
    assert line == {
        "id": "2d#det#microscopy#blood#cell_7.png#caption",
        "image": "images/07/blood_7.png",
        "width": 64,
        "height": 48,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is seen?"},
            {"from": "gpt", "value": "A Microscopy picture that shows red blood cell, platelet."},
        ],
    }
    assert list(conversation_line(kept(record(7), "text_single"))) == ["id", "conversations"]


def test_a_record_says_what_is_known_of_it_with_its_names_and_boxes(tmp_path):
    labels = (Label("a", (0, 0, 1, 1)), Label("a"), Label(ODD, area=0))
    with CorpusFiles(tmp_path) as files:
        files["records.jsonl"].write(record(labels=labels, part={"slice": 40}).to_json())
        files["dropped.jsonl"].write(record(labels=labels[1:]).to_json())
    first, second = (json.loads((tmp_path / name).read_bytes()) for name in files)
    assert first["labels"] == [
        {"name": "a", "box": [0, 0, 1, 1]},
        {"name": "a"},
        {"name": ODD, "area": 0},
    ]
    assert (first["label"], first["bbox"], first["provenance"]["part"]) == (
        ["a", ODD],
        [[0, 0, 1, 1]],
        {"slice": 40},
    )
    assert second["bbox"] is None


def test_forms_and_sides_go_to_their_files(tmp_path, monkeypatch):
    with CorpusFiles(tmp_path / "corpus") as files:
        for number, form in enumerate(FORMS):
            files.write(kept(record(number), form), held_out=False)
            image = tmp_path / record(number).image
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"image %d" % number)
        files.write(kept(record(0), "perception"), held_out=True)
    monkeypatch.setattr("data_tools.output.files._SHARD", 1)
    files.write_parquet(tmp_path)
    lines = {name: file["lines"] for name, file in files.contents().items()}
    assert lines == {
        "caption.jsonl": 2,
        "instruct.jsonl": 2,
        "percept.jsonl": 1,
        "text_single.jsonl": 1,
        "text_multi.jsonl": 1,
        "held_out/percept.jsonl": 1,
    }
    for name, count in lines.items():
        path = tmp_path / "corpus" / name
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        for row in (row for row in rows if "image" in row):
            content = (tmp_path / row["image"]).read_bytes()
            row["image"] = {"bytes": content, "path": row["image"]}
        shards = sorted(path.parent.glob(f"{path.stem}-*.parquet"))
        assert [row for one in shards for row in pq.read_table(one).to_pylist()] == rows
        assert len(shards) == count


def test_a_text_that_is_no_unicode_is_an_error_that_names_it(tmp_path):
    broken = record(id="2d#det#a\udcff.png")
    with (
        CorpusFiles(tmp_path) as files,
        pytest.raises(CorpusError, match=r"caption\.jsonl: .*udcff"),
    ):
        files.write(kept(broken), held_out=False)


def test_a_rejected_answer_keeps_reason_record_prompt_and_answer():
    one = record()
    line = rejected_line(rejected(one, "a refusal", detail="sorry", answer="I'm sorry."))
    assert (line["reason"], line["prompt"], line["answer"]) == (
        "a refusal",
        "Describe it.",
        "I'm sorry.",
    )
    assert line["problems"] == (Problem("a refusal", "sorry"),)
    assert line["record"]["id"] == one.id
    assert line["conversations"] == []
    one = kept(one)  # one that could be read is kept beside the answer
    read = StoredConversation(one.item, one.record, one.conversation, (Problem("too short"),))
    assert rejected_line(read)["conversations"] == conversation_line(one)["conversations"]
    assert (
        rejected_line(StoredConversation(one.item, one.record, None))["reason"] == "no conversation"
    )

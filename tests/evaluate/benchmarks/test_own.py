# SPDX-License-Identifier: Apache-2.0

"""A benchmark of one's own: a column map, and no code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gmai_xtuner.evaluate.benchmarks import BenchmarkError, load_benchmark, survey
from gmai_xtuner.evaluate.benchmarks.maps import PLACES, Layout, Map, ProtocolKeys
from gmai_xtuner.evaluate.questions import Benchmark, load_image
from tests.evaluate.files import (
    base64_png,
    csv_file,
    image_file,
    json_file,
    jsonl_file,
    medxpertqa_record,
    parquet_file,
    png,
    stored,
    tsv_file,
)

MAP = """
name: mine
id: id
question: question
options: options
answer: label
answer_is: letter
groups: [task]
"""


def record(number: int, **changes: Any) -> dict[str, Any]:
    options = ["liver", "lung", "heart"]
    return {
        "id": f"q{number}",
        "question": f"Q {number}?",
        "options": options,
        "label": "B",
        "task": "t",
        **changes,
    }


def write(folder: Path, text: str, rows: list[dict[str, Any]] | None = None) -> str:
    """Write ``mine.yaml`` and ``mine.jsonl``; return the map's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    jsonl_file(folder / "mine.jsonl", [record(1), record(2)] if rows is None else rows)
    return str(folder / "mine.yaml")


def asked(benchmark: Benchmark) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(one.text, one.options, one.answer) for one in benchmark.questions]


def test_one_reader_for_every_kind_of_file(tmp_path: Path) -> None:
    """The same two questions from JSON lines, JSON, CSV, TSV and Parquet, named by the map or by the data."""
    rows = [record(1), record(2, label="C")]
    expected = asked(load_benchmark(write(tmp_path, MAP, rows)))
    assert expected[1] == ("Q 2?", ("liver", "lung", "heart"), "heart")
    flat = [[str(value) for value in row.values()] for row in rows]
    files = [
        json_file(tmp_path / "json" / "mine.json", rows),
        csv_file(tmp_path / "csv" / "mine.csv", list(rows[0]), flat),
        tsv_file(tmp_path / "tsv" / "mine.tsv", list(rows[0]), flat),
        parquet_file(tmp_path / "parquet" / "mine.parquet", rows),
    ]
    for path in files:
        path.with_suffix(".yaml").write_text(MAP)
        for named in (path, path.with_suffix(".yaml")):
            assert asked(load_benchmark(str(named))) == expected, named
    assert asked(load_benchmark(str(tmp_path / "mine.yaml"), files[1])) == expected
    (protocol,) = load_benchmark(str(tmp_path / "mine.yaml")).protocols
    assert (protocol.name, protocol.scorer, protocol.table) == ("all", "choice", ("task",))


@pytest.mark.parametrize(
    ("key", "label"), [("letter", "B"), ("index0", 1), ("index1", "2"), ("text", "Lung")]
)
def test_the_answer_is_what_the_map_says(tmp_path: Path, key: str, label: object) -> None:
    path = write(tmp_path, MAP.replace("letter", key), [record(1, label=label)])
    assert load_benchmark(path).questions[0].answer == "lung"


def test_medxpertqa_by_a_map_gives_what_is_built_in(tmp_path: Path) -> None:
    records = [
        medxpertqa_record(f"MM-{n}", label="ABCDE"[n % 5], medical_task="xyz"[n % 3])
        for n in range(7)
    ]
    jsonl_file(tmp_path / "MM" / "test.jsonl", records)
    for number in range(7):
        image_file(tmp_path / "images" / f"MM-{number}-a.jpeg")
    text = """
name: medx
files: MM/test.jsonl
id: id
question: question
until: "\\nAnswer Choices:"
options: options
answer: label
answer_is: letter
images: images
image_folders: [../images]
groups: [medical_task, body_system, question_type]
macro: [medical_task]
"""
    (tmp_path / "medx.yaml").write_text(text)
    own = load_benchmark(str(tmp_path / "medx.yaml"))
    built_in = load_benchmark("medxpertqa", tmp_path)
    assert own.questions == built_in.questions
    for mine, theirs in zip(own.protocols, built_in.protocols[:1], strict=True):
        assert (mine.scorer, mine.averages, mine.questions) == (
            theirs.scorer,
            theirs.averages,
            theirs.questions,
        )
        for question in own.questions:
            assert mine.prompt(question) == theirs.prompt(question)
            assert mine.score(question, "B") == theirs.score(question, "B")


def test_images_stored_in_a_file(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "answer": "yes", "frames": [stored(1), stored(2)]}]
    parquet_file(tmp_path / "frames.parquet", rows)
    (tmp_path / "frames.yaml").write_text(
        "name: frames\nquestion: question\nanswer: answer\nimages: frames\n"
    )
    (question,) = load_benchmark(str(tmp_path / "frames.yaml")).questions
    assert [load_image(image) for image in question.images] == [png(1), png(2)]
    header = ("index", "image", "question", "A", "B", "answer", "dept")
    tsv_file(tmp_path / "t.tsv", header, [["0", base64_png(3), "Q?", "x", "y", "B", "ENT"]])
    (tmp_path / "t.yaml").write_text("name: t\nlike: vlmevalkit\ngroups: [dept]\n")
    (question,) = load_benchmark(str(tmp_path / "t.tsv")).questions
    assert (question.answer, question.groups) == ("y", {"dept": "ENT"})
    assert load_image(question.images[0]) == png(3)


ROW = r"mine\.jsonl', line 2, column '{}' \(question q2\): "


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (MAP.replace("label", "lable"), {}, r"has no column 'lable', .* answer\. Did you mean 'label'\?"),
        (MAP.replace("[task]", "[tusk]"), {}, r"no column 'tusk', .* groups\. Did you mean 'task'\?"),
        (MAP, {"label": "D"}, ROW.format("label") + r"the letter of an option \(A, B, C\) .*'D' came"),
        (MAP, {"label": "lung"}, r"'lung' came; it is the text of one: answer_is: text\?"),
        (MAP, {"label": ""}, ROW.format("label") + "the gold answer is empty"),
        (MAP.replace("letter", "index0"), {"label": 3}, "a number from 0 to 2 was expected, '3' came"),
        (MAP.replace("letter", "index1"), {"label": 0}, "a number from 1 to 3 was expected, '0' came"),
        (MAP.replace("letter", "text"), {"label": "bone"}, "'bone' is none of the options"),
        (MAP, {"id": "q1"}, "the id occurred before"),
        (MAP, {"options": "[1, 2"}, ROW.format("options") + ".* is no list"),
        (MAP, {"options": ["a", ""]}, "an empty option"),
        (MAP, {"options": ["a"]}, "only one option|was expected"),
        (MAP, {"options": {"1": "a", "2": "b"}}, "options have the letters A to Z"),
        (MAP, {"options": None}, "a list was expected, None came"),
        (MAP + "num_options: 4\n", {}, "4 options were expected, 3 came"),
        (MAP, {"question": " "}, "the question is empty"),
        (MAP + "expected: 1\n", {}, "2 questions, mine test has 1"),
        (MAP + f"sha256: {{mine.jsonl: '{64 * chr(48)}'}}\n", {}, "another version of the file"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_right_is_refused(
    tmp_path: Path, text: str, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, text, [record(1, label=changes.get("first", "B")), record(2, **changes)])
    if "answer_is: letter" not in text:
        content = record(
            1, label={"index0": 1, "index1": 1}.get(text.split("answer_is: ")[1].split()[0], "lung")
        )
        jsonl_file(tmp_path / "mine.jsonl", [content, record(2, **changes)])
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("mine.csv", "id,question,label,label\nq1,?,A,B\n", "two columns of one name"),
        (
            "mine.jsonl",
            '{"id": "q1", "label": "A", "label": "B"}\n',
            "the key 'label' is there twice",
        ),
        (
            "mine.json",
            '{"q1": {"label": "A"}, "q1": {"label": "B"}}',
            "the key 'q1' is there twice",
        ),
    ],
)
def test_a_column_that_is_there_twice_is_refused(
    tmp_path: Path, name: str, content: str, told: str
) -> None:
    path = write(tmp_path, MAP, [record(1)])
    (tmp_path / "mine.jsonl").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(BenchmarkError, match=told):
        load_benchmark(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MAP + "anser: x\n", r"mine\.yaml:9: unknown key 'anser'\. Did you mean 'answer'\?"),
        (
            MAP.replace("answer_is: letter\n", ""),
            r"mine\.yaml:6: answer_is must say how the column names",
        ),
        (MAP.replace("letter", "number"), r"mine\.yaml:7: answer_is: .* got 'number'"),
        (MAP.replace("name: mine\n", ""), "the key 'name' is missing"),
        (MAP.replace("mine", "slake"), "slake is a built-in benchmark"),
        (MAP + "macro: [organ]\n", "need the group 'organ'"),
        (MAP + "scorer: best\n", "no scorer is called 'best'"),
        (MAP.replace("question: question\n", ""), "question must name the column"),
        (MAP + "where: {task: '['}\n", "is no regular expression"),
        ("- 1\n", "a column map has keys"),
        ("name: [\n", "not valid YAML"),
        (MAP + "files: gone.jsonl\n", r"gone\.jsonl' is not there"),
    ],
)
def test_a_map_that_cannot_be_right_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        load_benchmark(write(tmp_path, text))


def test_the_page_explains_every_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "column_maps.md").read_text(encoding="utf-8")
    keys = {*Map.model_fields, *Layout.model_fields, *ProtocolKeys.model_fields, *PLACES}
    assert not [key for key in sorted(keys - {"layouts"}) if f"`{key}`" not in page]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = Path(write(tmp_path, MAP, []))
    with pytest.raises(BenchmarkError, match=r"mine\.jsonl' has no row"):
        load_benchmark(str(path))
    path.with_suffix(".jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(BenchmarkError, match=r"mine\.jsonl', line 2 is not valid JSON"):
        load_benchmark(str(path))
    jsonl_file(tmp_path / "other.jsonl", [record(1)])
    with pytest.raises(BenchmarkError, match=r"other\.jsonl' has no column map: write other\.yaml"):
        load_benchmark(str(tmp_path / "other.jsonl"))


def test_what_is_odd_is_told(tmp_path: Path) -> None:
    rows = [record(n, label=1 + n % 2, image=f"{n}.png") for n in range(24)]
    rows[3]["options"] = ["liver", "lung", "heart", "bone"]
    image_file(tmp_path / "0.png")
    text = MAP.replace("letter", "index0") + "images: image\n"
    benchmark = load_benchmark(write(tmp_path, text, rows))
    assert benchmark.counted_problems() == {
        "missing_image": 23,
        "option_count": 1,
        "answer_index": 1,
    }
    assert "23 of 3, 1 of 4" in benchmark.problems[-2].detail
    hashes = load_benchmark(
        write(tmp_path, text + f"sha256: {{mine.jsonl: '{digest(tmp_path)}'}}\n", rows)
    )
    assert len(hashes.questions) == 1


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "mine.jsonl").read_bytes()).hexdigest()


def test_a_folder_has_own_benchmarks_and_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, MAP)
    jsonl_file(tmp_path / "lonely.jsonl", [record(1)])
    (tmp_path / "wrong.yaml").write_text("name: wrong\nquestion: q\nanswre: x\n")
    (tmp_path / "job.yaml").write_text("some: other file\n")
    (tmp_path / "cut.parquet").write_bytes(b"no")
    json_file(tmp_path / "notes.json", [{"text": "x"}])
    found = survey(tmp_path)
    assert [(one.name, one.variant) for one in found.benchmarks] == [(path, "test")]
    told = json.dumps(found.faults)
    assert len(found.faults) == 3
    assert all(name in told for name in ("lonely.jsonl", "wrong.yaml:3", "cut.parquet"))
    assert "notes.json" in found.notes[0]

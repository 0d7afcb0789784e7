# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from data_tools import job as jobs
from gmai_xtuner.core.errors import JobError
from tests.tables import tables

TABLES = tables(__file__)

HEAD = """\
output: out
sources:
  - name: tissue
    reader: image_folder
    root: classes
    licence: MIT
    modality: Microscopy
    department: Hematology
"""


BOMB = "x0: &x0 [1]\n" + "\n".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9)
)


@pytest.fixture
def write(tmp_path: Path, classes: Path):
    def write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def errors(path: Path) -> list[str]:
    """``line: text`` of each mistake."""
    with pytest.raises(JobError) as caught:
        jobs.load(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines), lines
    return [line.removeprefix(f"{path}:") for line in lines]


def test_relative_paths_are_those_of_the_job_file(write, classes, monkeypatch):
    monkeypatch.chdir("/")
    path = write(HEAD + "writer: {name: openai, model: m, cache: answers.sqlite}\n")
    job = jobs.load(path)
    assert job.output == path.parent / "out"
    assert job.sources[0].root == classes
    assert job.writer.cache == path.parent / "answers.sqlite"
    assert job.path == path
    monkeypatch.chdir(
        path.parent.parent
    )  # an output beside the job is relative to the current folder
    assert jobs.load(path, output=Path("else")).output == path.parent.parent / "else"


def test_all_mistakes_are_told_at_once_with_their_lines(write):
    text = (
        HEAD.replace("licence: MIT", "licnce: MIT") + "sed: 3\nmake:\n  capton: 2\n  dialogue: -1\n"
    )
    assert errors(write(text)) == [
        "3: sources[0].licence: this key is missing.",
        "6: sources[0].licnce: unknown key; did you mean 'licence'?",
        "9: sed: unknown key; did you mean 'seed'?",
        "11: make.capton: unknown key; did you mean 'caption'?",
        "12: make.dialogue: input should be greater than or equal to 0, got -1.",
    ]


@pytest.mark.parametrize(("change", "line", "part"), TABLES["a_mistake_is_told_with_its_line"])
def test_a_mistake_is_told_with_its_line(write, change, line, part):
    found = errors(write(HEAD.replace(*change)))
    assert any(text.startswith(f"{line}: ") and part in text for text in found), found


AGAIN = HEAD.partition("sources:\n")[2].replace("tissue", "Tissue")  # case tells no names apart


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("seed: 1\ntitle: x\nseed: 2\n", "11: the key 'seed' is there twice, first in line 9."),
        (AGAIN, "9: sources[1].name: 'Tissue' is the name of another source as well."),
    ],
)
def test_what_is_there_twice_is_refused(write, more, expected):
    assert errors(write(HEAD + more)) == [expected]


def test_keys_are_text_as_written_so_codes_need_no_quotes(write):
    labels = "    labels: {1: neutrophil, no: absent, 007: rod, ~: none, x: null}\n"
    expected = {"1": "neutrophil", "no": "absent", "007": "rod", "~": "none", "x": None}
    assert jobs.load(write(HEAD + labels)).sources[0].labels == expected


def test_a_root_in_an_installed_package(write):
    import pydantic

    job = jobs.load(write(HEAD.replace("root: classes", "root: package:pydantic/plugin")))
    assert job.sources[0].root == Path(pydantic.__file__).parent / "plugin"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "expected keys"),
        ("output: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
        ("a: &a [*a]\n", "contains itself"),
        ("[" * 20_000, "nest"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "merge keys"),
        (f"a: {2**63}\n", "a number beyond 64 bits"),
        ("? [a]\n: b\n", "a key must be plain text"),
        ("output: out\nsources: {}\n", "a list of at least one source"),
        ("output: out\nsources: [7]\n", "expected the keys of a source"),
        (BOMB, "more than 1000000 values"),
    ],
)
def test_what_is_no_job_file_is_one_clear_error(write, text, part):
    with pytest.raises(JobError, match=part):
        jobs.load(write(text))


@pytest.mark.parametrize(
    ("data", "part"),
    [(b"\xff\xfe\x00", "UTF-8"), (b"a: \x00\n", "not valid YAML"), (None, "can't be read")],
)
def test_a_binary_or_missing_file_is_one_clear_error(tmp_path, data, part):
    path = tmp_path / "job.yaml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(JobError, match=part):
        jobs.load(path)


def test_a_table_lies_below_the_root_or_beside_the_job(write, classes, tmp_path):
    text = HEAD.replace("image_folder", "table").replace(
        "licence", "table: t.csv\n    image: file\n    label: class\n    licence"
    )
    (tmp_path / "t.csv").write_text("file,class\n")
    assert str(jobs.load(write(text)).sources[0].table) == str(tmp_path / "t.csv")
    (classes / "t.csv").write_text("file,class\n")
    assert str(jobs.load(write(text)).sources[0].table) == "t.csv"


@pytest.mark.parametrize(
    ("output", "part"),
    [
        (".", "holds the data of the source 'tissue'"),
        ("classes", "holds the data of the source 'tissue'"),
        ("classes/corpus", "lies below the root of the source 'tissue'"),
        ("out/../classes", "holds the data of the source 'tissue'"),
    ],
)
def test_the_output_and_the_data_are_apart(write, output, part):
    """What isn't a run's own in its output is deleted; its pictures are nobody's data."""
    (mistake,) = errors(write(HEAD.replace("output: out", f"output: {output}")))
    assert mistake.startswith("1: output: ")
    assert part in mistake

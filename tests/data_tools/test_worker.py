# SPDX-License-Identifier: Apache-2.0

"""What a worker makes of a record."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from data_tools import job as jobs
from data_tools import pipeline
from data_tools.checks import CheckOptions
from data_tools.command import Bar
from data_tools.forms import FORM_VERSIONS, MakeOptions
from data_tools.items import Conversation, SourceContext
from data_tools.records import Unit
from data_tools.store import StoredRecord, encode
from data_tools.worker import Recipe, make, unit_fingerprint
from tests.data_tools.forms.test_forms import Label, record


def written(of, seed: int, **forms: float) -> list[tuple[str, Conversation]]:
    none = dict.fromkeys(
        ("caption", "region_caption", "instruction", "dialogue", "perception", "text_single", "text_multi"), 0
    )  # fmt: skip
    context = SourceContext("toy", "Toy", ("edema", "nodule"))
    recipe = Recipe(
        MakeOptions(**none | {"chinese": 0} | forms), CheckOptions(), seed, None, context, None
    )
    (items,) = make(pickle.dumps(recipe), [StoredRecord(of.id, encode(of))])
    return [
        (item.suffix, msgspec.json.decode(item.conversation, type=Conversation)) for item in items
    ]


def test_no_two_conversations_of_a_record_are_the_same():
    of = record(Label("edema"))
    for seed in range(30):
        found = written(of, seed, caption=4, instruction=4, dialogue=3)
        assert len({made for _, made in found}) == len(found) == 11
    assert written(of, 0, caption=4) == written(of, 0, caption=4)


def test_what_has_no_other_words_is_made_once():
    """Where the wordings are used up, another text would be one of them again."""
    found = written(record(Label("edema"), department="None"), 0, text_single=9)
    texts = [made for _, made in found]
    assert len(set(texts)) == len(texts) <= 9


class Stages(Bar):
    """Notes how many records each stage of making has to do."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.to_make = 0

    def stage(self, name: str, *, total: int | None = None) -> None:
        if name.startswith("making "):
            self.to_make += total or 0


def test_conversations_are_made_again_for_a_new_version_and_for_nothing_else(
    classes, make_job, monkeypatch
):
    job = jobs.load(make_job({}, make={"dialogue": 0}))

    def made() -> int:
        stages = Stages()
        pipeline.run(job, pipeline.Selection(), progress=stages)
        return stages.to_make

    assert (made(), made()) == (6, 0)
    monkeypatch.setitem(FORM_VERSIONS, "caption", 99)
    assert (made(), made()) == (6, 0)
    monkeypatch.setitem(FORM_VERSIONS, "dialogue", 99)  # a form that the job doesn't make
    assert made() == 0
    monkeypatch.setattr(pipeline, "CHECK_VERSION", 99)
    assert (made(), made()) == (6, 0)


def test_answers_are_asked_for_again_for_a_new_version_of_the_prompts_or_checks(
    classes, make_job, monkeypatch
):
    job = jobs.load(make_job({}, writer={"name": "openai", "model": "m"}))
    context = SourceContext("tissue", "Tissue", ("NORM",))

    def answers() -> bytes | None:
        return pipeline.recipe_of(job, context, grounded=True).answers

    found = [answers(), answers()]
    monkeypatch.setattr("data_tools.writers.prompts.PROMPT_VERSION", 99)
    found.append(answers())
    monkeypatch.setattr(pipeline, "CHECK_VERSION", 99)
    found.append(answers())
    assert None not in found
    assert found[0] == found[1]
    assert len(set(found)) == 3


# --- fingerprints of units ---


@dataclass(frozen=True)
class Payload:
    row: dict[str, str]
    files: tuple[str, ...]


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    (tmp_path / "series").mkdir()
    for name in ("a.png", "mask.png", "series/1.dcm", "seen.png"):
        (tmp_path / name).write_bytes(b"12345")
    return Unit("a.png", Payload({"x1": "3"}, ("mask.png", "series")))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_it_is_the_same_in_every_process(tmp_path, unit):
    code = (
        "import sys; from pathlib import Path; from data_tools.records import Unit;"
        "from data_tools.worker import unit_fingerprint; p = Path(sys.argv[1]);"
        "print(unit_fingerprint(p, Unit('a.png', {'x': ['b', 'a'], 'f': ('mask.png', 1.5, None)})).hex())"
    )
    here = unit_fingerprint(
        tmp_path, Unit("a.png", {"x": ["b", "a"], "f": ("mask.png", 1.5, None)})
    ).hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "5"},
    )
    assert done.stdout.strip() == here


@pytest.mark.parametrize("name", ["a.png", "mask.png", "series/1.dcm", "seen.png"])
def test_a_change_of_any_file_of_the_unit_is_noticed(tmp_path, unit, name):
    before = unit_fingerprint(tmp_path, unit, ["seen.png"])
    assert unit_fingerprint(tmp_path, unit, ["seen.png"]) == before
    touch(tmp_path / name)
    assert unit_fingerprint(tmp_path, unit, ["seen.png"]) != before


def test_a_new_file_of_a_folder_and_a_vanished_file_are_noticed(tmp_path, unit):
    marks = [unit_fingerprint(tmp_path, unit)]
    (tmp_path / "series" / "2.dcm").write_bytes(b"")
    marks.append(unit_fingerprint(tmp_path, unit))
    (tmp_path / "mask.png").unlink()
    marks.append(unit_fingerprint(tmp_path, unit))
    assert len(set(marks)) == 3


def test_what_the_payload_says_counts(tmp_path):
    payloads = [
        {"a": "1"},
        {"a": 1},
        {"a": "2"},
        ["a", "1"],
        [["a"], "1"],
        None,
    ]
    assert len({unit_fingerprint(tmp_path, Unit("k", payload)) for payload in payloads}) == len(
        payloads
    )


def test_other_files_do_not_count(tmp_path, unit):
    before = unit_fingerprint(tmp_path, unit)
    touch(tmp_path / "seen.png")
    (tmp_path / "new.png").write_bytes(b"")
    assert unit_fingerprint(tmp_path, unit) == before


def test_a_set_that_was_moved_is_the_same_set(tmp_path, unit):
    before = unit_fingerprint(tmp_path, unit)
    moved = tmp_path.with_name(f"{tmp_path.name} moved")
    tmp_path.rename(moved)
    assert unit_fingerprint(moved, unit) == before


def test_a_payload_that_can_not_be_compared_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected plain values"):
        unit_fingerprint(tmp_path, Unit("k", object()))

# SPDX-License-Identifier: Apache-2.0

import json

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_tools import generate, job
from data_tools.job import OutputOptions
from data_tools.licences import DEMANDS, Origins, read, refusal
from data_tools.output import manifest
from tests.data_tools.conftest import draw
from tests.tables import tables

TABLES = tables(__file__)


@pytest.mark.parametrize(("name", "hub_name", "demands"), TABLES["what_a_name_says"])
def test_what_a_name_says(name, hub_name, demands):
    licence = read(name)
    assert (licence.hub_name, [*licence.demands]) == (hub_name, demands)
    assert set(licence.demands) <= set(DEMANDS)


def test_everything_is_kept_unless_the_job_says_otherwise():
    assert refusal("our hospital's own", OutputOptions()) is None


def test_a_list_keeps_those_in_it_however_they_are_spelt():
    options = OutputOptions(licences=["MIT", "CC BY 3.0"])
    assert refusal("cc-by-3.0", options) is None
    assert refusal("CC BY-SA 3.0", options) == "licence is not in the job's list"


def test_demands_are_refused_by_their_name():
    options = OutputOptions(refuse=["non-commercial", "share-alike"])
    assert refusal("CC BY 4.0", options) is None
    assert refusal("CC BY-NC-SA 4.0", options) == "licence is refused: share-alike, non-commercial"


@pytest.mark.parametrize("values", TABLES["options_outside_their_bounds_are_errors"])
def test_options_outside_their_bounds_are_errors(values):
    with pytest.raises(ValidationError):
        OutputOptions(**values)


def test_the_licence_of_a_record_counts_instead_of_its_source_s(make_job, tmp_path):
    """Articles of one set: what is open leaves; the rest is not stored if it may not be published."""
    cells = {"a": "CC BY 4.0", "b": "CC BY-NC-ND 4.0", "c": "", "d": "unknown"}
    for number, name in enumerate(cells):
        draw(tmp_path / "set" / f"{name}.png", number)
    rows = "".join(f"{name}.png,polyp,{licence}\n" for name, licence in cells.items())
    (tmp_path / "set" / "t.csv").write_text(f"file,finding,licence\n{rows}")
    source = {"reader": "table", "root": str(tmp_path / "set"), "table": "t.csv", "image": "file",
              "label": "finding", "licence_column": "licence", "licence": "CC0 1.0"}  # fmt: skip
    path = make_job(source)
    origins = Origins(job.load(path))
    name = job.load(path).sources[0].name
    assert [bool(origins[name, cell or "CC0 1.0"].forbidden) for cell in cells.values()] == [
        False, False, False, True
    ]  # fmt: skip
    for publishable, kept in ((False, "abcd"), (True, "ac")):
        path = make_job(source, corpus={"publishable": publishable, "held_out": 0})
        assert generate.main([str(path)]) == 0
        rows = pq.read_table(tmp_path / "out" / manifest.NAME).to_pylist()
        assert {row["source_file"][0]: row["licence"] for row in rows if row["image"]} == {
            name: cells[name] or "CC0 1.0" for name in kept
        }
        published = {row["source_file"][0] for row in rows if row["may_be_published"]}
        assert published == {"a", "c"}
        assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == len(kept)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not summary["sources"][name]["not_published"]

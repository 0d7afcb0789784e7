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


def test_the_licence_that_coco_names_for_an_image_counts(make_job, tmp_path):
    """By its address or name; nothing said is the source's; one that isn't listed drops the image."""
    licences = [
        {"id": 1, "name": "Attribution-NonCommercial-NoDerivs License",
         "url": "http://creativecommons.org/licenses/by-nc-nd/2.0/"},
        {"id": 2, "name": "unknown", "url": ""},
        {"id": 3, "name": "", "url": ""},
    ]  # fmt: skip
    of_image = {
        "a": {"license": 1},
        "b": {"license": 2},
        "c": {"license": 3},
        "d": {},
        "e": {"license": 9},
    }
    images, annotations = [], []
    for number, (name, more) in enumerate(of_image.items(), 1):
        draw(tmp_path / "set" / f"{name}.png", number)
        images.append({"id": number, "file_name": f"{name}.png"} | more)
        box = {"bbox": [4, 4, 20, 20], "category_id": 1}
        annotations.append({"id": number, "image_id": number} | box)
    content = {"images": images, "annotations": annotations, "licenses": licences}
    content["categories"] = [{"id": 1, "name": "polyp"}]
    (tmp_path / "set" / "coco.json").write_text(json.dumps(content))
    source = {"reader": "coco", "root": str(tmp_path / "set"), "annotations": "coco.json",
              "licence": "CC0 1.0"}  # fmt: skip
    stated = {"a": "CC BY-NC-ND 2.0", "b": "unknown", "c": "CC0 1.0", "d": "CC0 1.0"}
    name = job.load(make_job(source)).sources[0].name
    origins = Origins(job.load(make_job(source)))
    assert [bool(origins[name, one].forbidden) for one in stated.values()] == [False, True] + [
        False
    ] * 2
    for publishable, ignored, kept in (
        (False, False, "abcd"),
        (True, False, "cd"),
        (True, True, "abcde"),
    ):
        more = {"image_licences": False} if ignored else {}
        path = make_job(source | more, corpus={"publishable": publishable, "held_out": 0})
        assert generate.main([str(path)]) == 0
        rows = pq.read_table(tmp_path / "out" / manifest.NAME).to_pylist()
        assert {row["source_file"][0]: row["licence"] for row in rows if row["image"]} == {
            one: "CC0 1.0" if ignored else stated[one] for one in kept
        }
        assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == len(kept)


def test_a_licence_whose_name_and_address_differ_stops(make_job, tmp_path, capfd):
    by = "https://creativecommons.org/licenses/by/4.0/"
    content = {"images": [], "annotations": [], "categories": []}
    content["licenses"] = [{"id": 1, "name": "CC BY-NC 4.0", "url": by}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "coco.json").write_text(json.dumps(content))
    source = {"reader": "coco", "root": str(tmp_path / "set"), "annotations": "coco.json"}
    assert generate.main([str(make_job(source | {"licence": "CC0 1.0"}))]) == 1
    assert "licence id 1 is 'CC BY-NC 4.0', and 'CC BY 4.0' by its url" in capfd.readouterr().err

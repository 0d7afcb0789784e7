# SPDX-License-Identifier: Apache-2.0

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.mixture import load_mixture, sample_indices, select
from tests.tables import tables

TABLES = tables(__file__)

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "configs" / "gmai_vl" / "mixtures" / "gmai_vl_5_5m.yaml"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.json").write_text("[]")
    return tmp_path


def load(folder, text, *, name="mixture.yaml", **options):
    (folder / name).write_text(text, encoding="utf-8")
    return load_mixture(folder / name, **options)


def one(folder, fields, **options):
    """The only entry of a mixture, its fields given as YAML flow text."""
    return load(folder, f"datasets:\n  d: {{{fields}}}\n", **options).entries[0]


def refused(folder, text, **options) -> str:
    with pytest.raises(MixtureError) as caught:
        load(folder, text, **options)
    assert str(folder / options.get("name", "mixture.yaml")) in str(caught.value)
    return str(caught.value)


# --- our form ------------------------------------------------------------------------------


def test_every_field_and_default(folder):
    mixture = load(
        folder,
        """
defaults: {quality: low, image_root: images}
datasets:
  full:
    annotations: [a.jsonl, b.json]
    image_root: images
    category: Medical Instruction
    quality: high
    ratio: {stage1: 1, stage2: 2.5, stage3: 0.0}
    over_length: drop
    on_bad_sample: skip
    size: 12
  2019:
    annotations: a.jsonl
    image_root:
""",
    )
    full, short = mixture.entries
    assert full.name == "full"
    assert full.annotations == (folder / "a.jsonl", folder / "b.json")
    assert full.image_root == folder / "images"
    assert (full.category, full.quality) == ("Medical Instruction", "high")
    assert full.ratios == {"stage1": 1.0, "stage2": 2.5, "stage3": 0.0}
    assert (full.over_length, full.on_bad_sample, full.size) == ("drop", "skip", 12)
    assert short.name == "2019"
    assert short.image_root is None
    assert (short.category, short.quality) == (None, "low")
    assert short.ratios == {"stage1": 1.0, "stage2": 1.0, "stage3": 1.0}
    assert (short.over_length, short.on_bad_sample, short.size) == ("cut", None, None)
    assert pickle.loads(pickle.dumps(mixture)) == mixture


def test_json_is_read_too_tabs_included(folder):
    text = json.dumps({"datasets": {"d": {"annotations": "a.jsonl", "ratio": 0.5}}}, indent="\t")
    assert load(folder, text, name="m.json").entries[0].ratios["stage3"] == 0.5


def test_paths_fall_back_on_the_working_directory(folder, monkeypatch):
    inner = folder / "inner"
    inner.mkdir()
    monkeypatch.chdir(folder)
    assert one(inner, "annotations: a.jsonl, image_root: images").image_root == folder / "images"
    (inner / "a.jsonl").write_text("")
    assert one(inner, "annotations: a.jsonl").annotations == (inner / "a.jsonl",)
    message = refused(inner, "datasets:\n  d:\n    annotations: none.jsonl\n")
    assert str(inner / "none.jsonl") in message
    assert str(folder / "none.jsonl") in message
    assert ":3: " in message


def test_missing_files_may_be_left_unchecked(folder):
    entry = one(folder, "annotations: n.jsonl, image_root: none", check_files=False)
    assert entry.annotations == (folder / "n.jsonl",)
    assert entry.image_root == folder / "none"


@pytest.mark.parametrize(("fields", "words"), TABLES["bad_field_names_line_and_dataset"])
def test_bad_field_names_line_and_dataset(folder, fields, words, monkeypatch):
    (folder / "bad.zip").write_text("no archive")
    monkeypatch.setenv("GMAI_CACHE", str(folder / "cache"))
    message = refused(folder, f"datasets:\n  d: {{{fields}}}\n")
    assert words in message
    assert ":2: " in message
    assert "dataset 'd'" in message


@pytest.mark.parametrize(("text", "words"), TABLES["bad_mixture_is_one_clear_error"])
def test_bad_mixture_is_one_clear_error(folder, text, words):
    assert words in refused(folder, text)


def test_unreadable_mixture(tmp_path):
    with pytest.raises(MixtureError, match="can't be read"):
        load_mixture(tmp_path / "none.yaml")
    with pytest.raises(MixtureError, match="ends in"):
        load_mixture(tmp_path / "none.toml")
    (tmp_path / "m.yaml").write_bytes(b"datasets: \xff")
    with pytest.raises(MixtureError, match="not UTF-8"):
        load_mixture(tmp_path / "m.yaml")


# --- the authors' form ------------------------------------------------------------------------

AUTHORS = """{
    "FILE1": {
        "image_dir": "",
        "annotations": "a.jsonl",
        "sample_ratio": 1.5,
        "length": 38276,
        "data_augment": true
    },
}"""


def test_authors_form_with_its_trailing_comma(folder):
    with pytest.raises(json.JSONDecodeError):
        json.loads(AUTHORS)
    (entry,) = load(folder, AUTHORS, name="example_list.json").entries
    assert entry.name == "FILE1"
    assert entry.image_root == folder
    assert entry.ratios == {"stage1": 1.5, "stage2": 1.5, "stage3": 1.5}
    assert entry.size == 38276


def test_empty_image_root_is_the_annotations_folder(folder):
    (folder / "images" / "c.jsonl").write_text("")
    entry = one(folder, 'annotations: images/c.jsonl, image_root: ""')
    assert entry.image_root == folder / "images"
    message = refused(
        folder, "datasets:\n  d: {annotations: [a.jsonl, images/c.jsonl], image_root: ''}\n"
    )
    assert "they lie in several" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sample_ratio", "sample_ration", ":5: dataset 'FILE1': unknown key"),
        ("1.5", "-1", ":5: dataset 'FILE1': sample_ratio must be"),
        ("38276", '"x"', ":6: dataset 'FILE1': length must be a number of records"),
        ("true", "3", ":7: dataset 'FILE1': data_augment must be"),
        ('"annotations"', '"annotation"', "Did you mean 'annotations'?"),
    ],
)
def test_authors_form_is_checked_line_by_line(folder, old, new, words):
    assert words in refused(folder, AUTHORS.replace(old, new), name="m.json")


# --- selection and sampling ---------------------------------------------------------------------

SELECT = """
datasets:
  a: {annotations: a.jsonl, quality: high, ratio: {stage1: 1, stage2: 0, stage3: 0.5}}
  b: {annotations: a.jsonl, quality: low, ratio: {stage1: 1, stage2: 0, stage3: 0}}
"""


def names(pairs):
    return [(entry.name, ratio) for entry, ratio in pairs]


def test_select_by_stage_and_quality(folder):
    mixture = load(folder, SELECT)
    assert names(select(mixture, stage="stage1")) == [("a", 1.0), ("b", 1.0)]
    assert names(select(mixture, stage="stage3")) == [("a", 0.5)]
    assert names(select(mixture, stage="stage1", quality="low")) == [("b", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stage": "stage2"}, "no dataset has a ratio above 0 in stage2"),
        ({"stage": "stage3", "quality": "low"}, "no dataset of quality 'low'"),
        ({"stage": "stage4"}, "stage must be one of"),
        ({"stage": "stage1", "quality": "best"}, "quality must be one of"),
    ],
)
def test_select_refuses(folder, arguments, words):
    with pytest.raises(MixtureError, match=words):
        select(load(folder, SELECT), **arguments)


def test_select_by_quality_never_drops_what_has_none(folder):
    mixture = load(folder, SELECT + "  c: {annotations: a.jsonl}\n")
    with pytest.raises(MixtureError, match="but c has none"):
        select(mixture, stage="stage1", quality="high")


@given(
    st.integers(0, 500),
    st.floats(0, 4, allow_nan=False) | st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.0, 2.5]),
    st.integers(0, 2**40),
)
def test_sample_has_the_size_and_the_counts_of_its_ratio(size, ratio, seed):
    indices = sample_indices(size, ratio, seed=seed, name="d")
    assert indices.dtype == np.int64
    assert len(indices) == round(size * ratio)
    assert (np.diff(indices) >= 0).all()
    counts = np.bincount(indices, minlength=size)
    assert len(counts) == size
    assert ((counts == np.floor(ratio)) | (counts == np.ceil(ratio))).all()
    again = sample_indices(size, ratio, seed=seed, name="d")
    assert np.array_equal(indices, again)


def test_sample_depends_on_seed_and_name():
    first = sample_indices(1000, 0.5, seed=0, name="a")
    assert not np.array_equal(first, sample_indices(1000, 0.5, seed=1, name="a"))
    assert not np.array_equal(first, sample_indices(1000, 0.5, seed=0, name="b"))


@pytest.mark.parametrize(
    "arguments", [(-1, 1.0, 0), (1, -1.0, 0), (1, float("nan"), 0), (1, 1, -1)]
)
def test_sample_refuses_nonsense(arguments):
    size, ratio, seed = arguments
    with pytest.raises(ValueError, match="not negative"):
        sample_indices(size, ratio, seed=seed, name="d")


# --- Table 7 --------------------------------------------------------------------------------


def test_template_is_table_7_row_by_row():
    entries = load_mixture(TEMPLATE, check_files=False).entries
    found = [[e.category, e.name, e.size, e.ratios["stage1"], e.ratios["stage3"]] for e in entries]
    assert found == TABLES["TABLE_7"]
    assert len(found) == 47
    assert all(entry.ratios["stage1"] == entry.ratios["stage2"] for entry in entries)
    assert len({entry.name for entry in entries}) == 47
    assert len({entry.annotations for entry in entries}) == 47
    for entry in entries:
        assert entry.quality == ("low" if entry.ratios["stage3"] < 0.5 else "high")
        assert (entry.image_root is None) == entry.category.endswith("Text")


# --- variants -----------------------------------------------------------------------------------


def variant(folder: Path, text: str) -> Path:
    """A base of three datasets in a folder of its own, and a mixture that names it."""
    (folder / "base").mkdir()
    for name in ("a", "b", "c"):
        (folder / "base" / f"{name}.jsonl").write_text("{}\n")
    rows = "".join(
        f"  gen-{name}: {{annotations: {name}.jsonl, ratio: {number}}}\n"
        for number, name in enumerate(("a", "b"), 1)
    )
    base = f"datasets:\n{rows}  real: {{annotations: c.jsonl}}\n"
    (folder / "base" / "mixture.yaml").write_text(base)
    (folder / "own.jsonl").write_text("{}\n")
    (folder / "leaks.txt").write_text("id: 1\n")
    (folder / "variant.yaml").write_text(text)
    return folder / "variant.yaml"


def test_a_variant_lacks_what_its_patterns_match_and_keeps_the_rest_as_it_is(tmp_path):
    path = variant(tmp_path, "base: base/mixture.yaml\nwithout: ['gen-*']\n")
    mixture = load_mixture(path)
    assert [entry.name for entry in mixture.entries] == ["real"]
    assert mixture.entries == load_mixture(tmp_path / "base" / "mixture.yaml").entries[2:]
    assert mixture.without == ("gen-a", "gen-b")
    assert mixture.known == {"gen-a", "gen-b", "real"}


def test_a_variant_may_add_datasets_and_exclude_from_all(tmp_path):
    path = variant(
        tmp_path,
        "base: base/mixture.yaml\nwithout: gen-a\nexclude: leaks.txt\n"
        "datasets: {own: {annotations: own.jsonl}}\n",
    )
    entries = load_mixture(path).entries
    assert [entry.name for entry in entries] == ["gen-b", "real", "own"]
    assert {entry.exclude for entry in entries} == {(tmp_path / "leaks.txt",)}


@pytest.mark.parametrize(
    ("text", "message"),
    TABLES["variants_that_cannot_be_are_refused"],
)  # fmt: skip
def test_variants_that_cannot_be_are_refused(tmp_path, text, message):
    with pytest.raises(MixtureError, match=message):
        load_mixture(variant(tmp_path, text))


def test_a_variant_without_any_dataset_left_is_refused_by_the_stage(tmp_path):
    mixture = load_mixture(variant(tmp_path, "base: base/mixture.yaml\nwithout: ['*']\n"))
    with pytest.raises(MixtureError, match="no dataset has a ratio above 0"):
        select(mixture, stage="stage1")


def test_the_paper_mixture_without_the_generated_corpus_is_table_7_without_five_rows():
    path = TEMPLATE.with_name("gmai_vl_5_5m_without_generated.yaml")
    without = load_mixture(path, check_files=False)
    assert without.without == (
        "GMAI-MM-Caption-1.7M", "GMAI-MM-Percept-1.3M", "GMAI-MM-Instruct-0.9M",
        "GMAI-Text-Single-1M", "GMAI-Text-Multi-0.6M",
    )  # fmt: skip
    whole = load_mixture(TEMPLATE, check_files=False)
    assert [*without.entries] == [e for e in whole.entries if e.name not in without.without]
    assert len(without.entries) == 42

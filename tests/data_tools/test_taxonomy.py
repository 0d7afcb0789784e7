# SPDX-License-Identifier: Apache-2.0

"""The vocabulary and its extension by a user."""

import pickle

import pytest

from data_tools.lexicon import contradicts, noun, number_word, plural_of
from data_tools.taxonomy import load
from gmai_xtuner.core.errors import CorpusError
from tests.tables import tables

TABLES = tables(__file__)


def test_counts_of_gmai_mmbench():
    taxonomy = load()
    assert len(taxonomy.names("departments")) == 19
    assert taxonomy.names("departments")[-1] == "None"
    assert len(taxonomy.names("clinical_tasks")) == 18
    assert taxonomy.names("source_tasks") == (
        "2D classification", "2D detection", "2D segmentation", "3D segmentation",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [("MR", "MR"), ("ct", "CT"), ("DX", "X-ray"), ("x ray", "X-ray"), ("magnetic  resonance", "MR"),
     ("OP", "Fundus photography"), ("超声", "Ultrasound"), ("H&E", "Pathology")],
)  # fmt: skip
def test_a_modality_goes_by_any_of_its_names(text, name):
    assert load().find("modalities", text) == name
    assert load().find("clinical_tasks", "MR") == "Microorganism Recognition"  # of another kind


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(CorpusError, match=r"no modality 'ultrasond'\. Did you mean Ultrasound"):
        load().find("modalities", "ultrasond")
    with pytest.raises(CorpusError, match="Known are Cardiovascular Surgery, Dermatology"):
        load().find("departments", "xyz")


def test_every_term_has_a_chinese_name_except_where_it_is_the_same():
    taxonomy = load()
    for name in (
        *taxonomy.names("modalities"),
        *taxonomy.names("departments"),
        *taxonomy.names("clinical_tasks"),
    ):
        assert taxonomy.terms(name).chinese, name


def test_a_file_adds_terms_and_names(tmp_path):
    extra = tmp_path / "terms.yaml"
    extra.write_text(
        "modalities:\n  Thermography: {chinese: 热成像, synonyms: [thermogram]}\n"
        "  CT: {synonyms: [cone beam]}\n",
        encoding="utf-8",
    )
    taxonomy = load(extra)
    assert taxonomy.find("modalities", "Thermogram") == "Thermography"
    assert taxonomy.find("modalities", "cone beam") == "CT"
    assert "CAT scan" in taxonomy.terms("CT").synonyms
    assert "Thermography" not in load().names("modalities")


@pytest.mark.parametrize(
    ("text", "problem"),
    TABLES["errors_of_a_file_say_where"],
)  # fmt: skip
def test_errors_of_a_file_say_where(tmp_path, text, problem):
    extra = tmp_path / "terms.yaml"
    extra.write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError) as raised:
        load(extra)
    assert problem in str(raised.value)
    assert str(extra) in str(raised.value)


def test_a_worker_gets_a_copy():
    assert pickle.loads(pickle.dumps(load())).find("modalities", "mri") == "MR"


# --- What kind of thing a label names, and which labels deny others ---


@pytest.mark.parametrize(
    ("label", "kind", "is_plural"), TABLES["a_label_is_what_its_last_words_name"]
)
def test_a_label_is_what_its_last_words_name(label, kind, is_plural):
    assert (noun(label).kind, noun(label).is_plural) == (kind, is_plural)


@pytest.mark.parametrize(
    ("one", "many"),
    [("platelet", "platelets"), ("left kidney", "left kidneys"), ("mass", "masses"), ("gyrus", "gyri"),
     ("metastasis", "metastases"), ("drusen", "drusen"), ("biopsy forceps", "biopsy forceps")],
)  # fmt: skip
def test_plurals(one, many):
    noun(one)  # the lexicon's own plurals are read with it
    assert plural_of(one) == many


def test_numbers():
    assert [number_word(number) for number in (2, 9, 10, 23)] == ["two", "nine", "ten", "23"]


@pytest.mark.parametrize(
    ("label", "other", "against"), TABLES["which_labels_cannot_be_true_together"]
)
def test_which_labels_cannot_be_true_together(label, other, against):
    assert contradicts(label, other) is against

# SPDX-License-Identifier: Apache-2.0

"""What kind of thing a label names, and which labels deny others."""

from __future__ import annotations

import pytest

from data_tools.lexicon import contradicts, noun, number_word, plural_of, with_article


@pytest.mark.parametrize(
    ("label", "kind", "is_plural"),
    [
        ("spleen", "anatomy", False),
        ("inferior vena cava", "anatomy", False),
        ("head of the pancreas", "anatomy", False),
        ("left kidney", "anatomy_of_many", False),
        ("kidney_left", "anatomy_of_many", False),
        ("vertebra L1", "anatomy_of_many", False),
        ("vertebrae", "anatomy_of_many", True),
        ("Neutrophil", "cell", False),
        ("red blood cells", "cell", True),
        ("forceps", "instrument", True),
        ("lung nodule", "finding", False),
        ("metastases", "finding", True),
        ("gallstones", "", True),
        ("pneumonia", "", False),
        ("ascites", "", False),
        ("anteroposterior projection", "view", False),
    ],
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


def test_articles_and_numbers():
    words = "CT image, MR image, X-ray image, OCT image, ultrasound image, uterus, unilateral x"
    assert ", ".join(map(with_article, words.split(", "))) == (
        "a CT image, an MR image, an X-ray image, an OCT image, an ultrasound image, a uterus, a unilateral x"
    )
    assert [number_word(number) for number in (2, 9, 10, 23)] == ["two", "nine", "ten", "23"]


@pytest.mark.parametrize(
    ("label", "other", "against"),
    [
        ("no finding", "red blood cell", True),
        ("No findings", "heart", True),
        ("without abnormality", "*", True),
        ("no finding", "normal", False),
        ("no nodule", "lung nodule", True),
        ("no nodule", "edema", False),
        ("no nodule", "*", True),
        ("normal", "pneumonia", True),
        ("normal", "*", True),
        ("normal", "heart", False),
        ("normal", "neutrophil", False),
        ("normal", "anteroposterior projection", False),
        ("pneumonia", "edema", False),
        ("pneumonia", "*", False),
        ("normal neutrophil", "edema", False),
    ],
)
def test_which_labels_cannot_be_true_together(label, other, against):
    assert contradicts(label, other) is against

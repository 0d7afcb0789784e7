# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_tools.job import OutputOptions
from data_tools.licences import DEMANDS, read, refusal


@pytest.mark.parametrize(
    ("name", "hub_name", "demands"),
    [
        ("CC0", "cc0-1.0", ()),
        ("CC0 1.0 Universal", "cc0-1.0", ()),
        ("Public Domain", "pddl", ()),
        ("MIT", "mit", ("attribution",)),
        ("Apache-2.0", "apache-2.0", ("attribution",)),
        ("Apache License 2.0", "apache-2.0", ("attribution",)),
        ("BSD 3-Clause", "bsd-3-clause", ("attribution",)),
        ("CC BY 3.0", "cc-by-3.0", ("attribution",)),
        ("CC-BY-4.0", "cc-by-4.0", ("attribution",)),
        ("CC BY", "cc", ("attribution",)),
        ("CC BY-SA 4.0", "cc-by-sa-4.0", ("attribution", "share-alike")),
        ("cc by-nc-sa 4.0", "cc-by-nc-sa-4.0", ("attribution", "share-alike", "non-commercial")),
        ("CC BY-NC-ND 4.0", "cc-by-nc-nd-4.0", ("attribution", "non-commercial", "no-derivatives")),
        (
            "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
            "cc-by-nc-sa-4.0",
            ("attribution", "share-alike", "non-commercial"),
        ),
        ("ODbL 1.0", "odbl", ("attribution", "share-alike")),
        ("PhysioNet Credentialed Health Data License 1.5.0", "other", ("agreement",)),
        ("Stanford data use agreement", "other", ("agreement",)),
        ("MIT of our department, ask Anna", "other", ("unknown",)),
        ("CC BY unless stated otherwise on page 3", "other", ("unknown",)),
        ("unknown", "other", ("unknown",)),
        ("CC0 for the code, CC BY-NC for the images", "other", ("unknown",)),
        ("CC BY unless stated otherwise", "other", ("unknown",)),
        ("public domain in the US only", "other", ("unknown",)),
        ("GPLv3", "gpl", ("attribution", "share-alike")),
        ("CC BY 3.0 Unported", "cc-by-3.0", ("attribution",)),
    ],
)
def test_what_a_name_says(name, hub_name, demands):
    licence = read(name)
    assert (licence.hub_name, licence.demands) == (hub_name, demands)
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


@pytest.mark.parametrize(
    "values",
    [
        {"refuse": ["commercial"]},
        {"held_out": 0.6},
        {"held_out": -0.1},
        {"near_duplicates": 5},
        {"examples": 1_000},
        {"shares": 0.1},
    ],
)
def test_options_outside_their_bounds_are_errors(values):
    with pytest.raises(ValidationError):
        OutputOptions(**values)

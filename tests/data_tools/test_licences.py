# SPDX-License-Identifier: Apache-2.0

import pytest
from pydantic import ValidationError

from data_tools.job import OutputOptions
from data_tools.licences import DEMANDS, read, refusal
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

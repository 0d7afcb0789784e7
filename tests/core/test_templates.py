# SPDX-License-Identifier: Apache-2.0

"""Templates: a missing value is an error, values of pages are escaped, tags leave no lines."""

import pytest
from jinja2 import UndefinedError

from gmai_xtuner.core.templates import environment


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="count"):
        environment("gmai_xtuner").from_string("{{ count }}").render()


@pytest.mark.parametrize(("html", "shown"), [(True, "&lt;b&gt;"), (False, "<b>")])
def test_values_are_escaped_in_pages_alone(html, shown):
    template = environment("gmai_xtuner", html=html).from_string("{{ text }}")
    assert template.render(text="<b>") == shown


def test_tags_leave_no_lines():
    text = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert environment("gmai_xtuner").from_string(text).render() == "a\nb\nc"

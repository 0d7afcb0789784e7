# SPDX-License-Identifier: Apache-2.0

"""What the README and the docs point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text, "a place that was to be filled in"
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert page.name != "README.md" or links
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link

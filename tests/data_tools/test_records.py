# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.records import ANYTHING, NOTHING, Drop, Drops
from gmai_xtuner.core.errors import Unusable


def test_an_annotation_that_falls_is_lost_in_the_images_of_its_scope():
    drops = Drops()
    seen = []
    with drops.annotation("table line 2", "cyst"):
        raise Unusable("row that can't be read", "x")
    for name in ("a", "b"):
        with drops.image(name):
            with drops.annotation(f"{name} object 1", "polyp"):
                if name == "a":
                    raise Unusable("box of no size")
            drops.add("duplicate row", name, lost=NOTHING)
            seen.append(sorted(drops.incomplete))
    assert seen == [["cyst", "polyp"], ["cyst"]]
    assert drops.incomplete == {"cyst"}
    assert drops.found == [
        Drop("read", "row that can't be read", "table line 2", "x"),
        Drop("read", "box of no size", "a object 1"),
        Drop("read", "duplicate row", "a"),
        Drop("read", "duplicate row", "b"),
    ]


def test_outside_of_an_annotation_the_image_falls_and_the_next_is_whole():
    drops = Drops()
    with drops.image("a", stage="record") as lost:
        drops.add("crowd annotation", "a", lost=["cell"])
        assert lost == {"cell"}
        raise Unusable("image is truncated", "half")
    with drops.image("b"):
        assert drops.incomplete == set()
    assert drops.found[-1] == Drop("record", "image is truncated", "a", "half")


@pytest.mark.parametrize("lost", [{}, {"lost": [""]}, {"lost": [" "]}])
def test_what_falls_without_a_name_may_be_anything(lost):
    drops = Drops()
    drops.add("row that can't be read", "line 2", **lost)
    assert drops.incomplete == {ANYTHING}
    drops = Drops()
    with drops.annotation("line 2"):
        raise Unusable("row that can't be read")
    assert drops.incomplete == {ANYTHING}

# SPDX-License-Identifier: Apache-2.0


import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.output.splits import Split, SplitBuilder, hashes, perceptual_hash
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.contamination.sides import picture

Rows = list[tuple[str, str]]  # group, picture
rows = st.lists(
    st.tuples(
        st.integers(0, 30).map("patient{}".format), st.integers(0, 40).map("images/{}.png".format)
    ),
    max_size=60,
)
pairs = st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=10)


def split(rows: Rows, *, share: float = 0.3, seed: int = 0, alike: list = ()) -> Split:
    builder = SplitBuilder(share, seed=seed)
    for group, image in rows:
        builder.add(group, image)
    found = builder.split([pair for pair in alike if max(pair) < len(rows)])
    assert builder.held_out(found).tolist() == [found.held_out(group) for group, _ in rows]
    return found


@given(rows, pairs, st.integers(0, 3))
def test_no_group_no_picture_and_no_near_duplicate_is_on_both_sides(rows, alike, seed):
    found = split(rows, seed=seed, alike=alike)
    sides = [found.held_out(group) for group, _ in rows]
    for place in (0, 1):
        by_name = {}
        for row, side in zip(rows, sides, strict=True):
            assert by_name.setdefault(row[place], side) == side
    for one, other in alike:
        if max(one, other) < len(rows):
            assert sides[one] == sides[other]


@given(rows, rows, st.integers(0, 3))
def test_what_is_held_out_stays_so_when_data_is_added(old, new, seed):
    before, after = split(old, seed=seed), split(old + new, seed=seed)
    for group, _ in old:
        assert after.held_out(group) >= before.held_out(group)


@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_records_changes_nothing(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, other = split(rows), split(shuffled)
    assert all(one.held_out(group) == other.held_out(group) for group, _ in rows)


def test_groups_without_links_never_move():
    one = split([(f"patient{n}", f"images/{n}.png") for n in range(500)])
    more = split([(f"patient{n}", f"images/{n}.png") for n in range(2_000)])
    sides = [one.held_out(f"patient{n}") for n in range(500)]
    assert sides == [more.held_out(f"patient{n}") for n in range(500)]
    assert len(set(sides)) == 2
    assert (more.groups, more.linked, more.largest) == (2_000, 0, 1)


def test_the_share_is_that_of_the_groups_and_the_seed_chooses_which():
    rows = [(f"patient{n}", f"images/{n}.png") for n in range(20_000)]
    chosen = [split(rows, share=0.05, seed=seed) for seed in (0, 1)]
    held = [np.array([one.held_out(group) for group, _ in rows]) for one in chosen]
    for one in held:
        assert one.mean() == pytest.approx(0.05, abs=0.005)
    assert (held[0] & held[1]).mean() == pytest.approx(0.0025, abs=0.0015)


def test_a_chain_of_shared_pictures_is_one_set():
    """Each patient shares a picture with the next; one of them falls into the share, so all do."""
    chain = [(f"patient{n + k}", f"images/{n}.png") for n in range(999) for k in (0, 1)]
    apart = [(f"other{n}", f"images/other{n}.png") for n in range(100)]
    found = split(chain + apart, share=0.05)
    assert {found.held_out(group) for group, _ in chain} == {True}
    assert {found.held_out(group) for group, _ in apart} == {True, False}
    assert (found.groups, found.linked, found.largest) == (1_100, 1_000, 1_000)


def test_nothing_is_held_out_of_a_share_of_zero():
    found = split([(f"patient{n}", "images/same.png") for n in range(50)], share=0)
    assert not any(found.held_out(f"patient{n}") for n in range(50))


def test_a_picture_that_was_saved_again_or_made_smaller_is_close(tmp_path):
    for seed in range(8):
        picture(seed).save(tmp_path / "a.png")
        picture(seed).save(tmp_path / "b.jpg", quality=60)
        picture(seed).resize((97, 97)).save(tmp_path / "c.png")
        picture(seed).convert("RGB").save(tmp_path / "d.png")
        first, *others = (perceptual_hash(path) for path in sorted(tmp_path.iterdir()))
        assert max((first ^ other).bit_count() for other in others) <= 2


def test_a_picture_without_anything_in_it_has_the_hash_zero(tmp_path):
    for level in (0, 37, 128, 255):
        Image.new("L", (50, 40), level).save(tmp_path / "grey.png")
        assert perceptual_hash(tmp_path / "grey.png") == 0


def test_a_picture_that_cannot_be_read_stops_with_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(CorpusError, match=r"a\.png: a stored image can't be read"):
        hashes([tmp_path / "a.png"], threads=1)


def test_hashes_keep_the_order_of_the_paths(tmp_path):
    paths = []
    for seed in range(5):
        paths.append(tmp_path / f"{seed}.png")
        picture(seed).save(paths[-1])
    expected = [perceptual_hash(path) for path in paths]
    assert hashes(iter(paths), threads=3).tolist() == expected
    assert hashes([], threads=1).tolist() == []

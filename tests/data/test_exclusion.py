# SPDX-License-Identifier: Apache-2.0

"""A plan leaves out exactly the conversations that exclude lists name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.exclusion import Exclusion
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.plan import _rows_of
from tests.data.test_held_out import write_cache
from tests.toy import Corpus, record

IMAGES = [f"{number}.png" for number in range(8)]
CHEST = [
    *(record(f"c{n}", "<image>\nWhat is shown?", f"Lung {n}.", image=IMAGES[n]) for n in range(6)),
    record("c6", "<image><image>\nSame?", "No.", image=["6.png", "1.png"]),
    record("7", "Why?", "Because."),
]
BRAIN = [
    *(record(f"b{n}", "<image>\nWhat is shown?", f"Brain {n}.", image=IMAGES[n]) for n in range(6)),
    record("7", "How?", "So."),
]


def test_rows_by_id_and_by_any_of_their_images(tmp_path: Path) -> None:
    rows = [("a", ["1"]), ("b", []), ("c", ["2", "3"]), ("d", ["3", "1"]), ("1", ["4"]), ("e", [])]
    cache = write_cache(tmp_path / "cache", rows)
    exclusion = Exclusion(frozenset({"b", "x"}), frozenset({"1", "9"}))
    mask, found = _rows_of(exclusion, cache)
    assert mask.tolist() == [True, True, False, True, False, False]
    assert found == Exclusion(frozenset({"b"}), frozenset({"1"}))
    assert write_cache(tmp_path / "empty", []).is_dir()
    assert _rows_of(Exclusion(frozenset({"b"})), tmp_path / "empty")[0].tolist() == []


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    return make_corpus({"chest": CHEST, "brain": BRAIN}, images=IMAGES)


def exclude(corpus: Corpus, text: str) -> None:
    """Give the whole mixture a list."""
    (corpus.folder / "exclude.txt").write_text(text)
    mixture = corpus.mixture.read_text().replace("exclude: exclude.txt\n", "")
    corpus.mixture.write_text(mixture + "exclude: exclude.txt\n")


def trained_on(dataset: SoftPackedDataset) -> list[str]:
    """Names of the conversations in the packs of an epoch, each as often as it is there."""
    return sorted(name for number in range(len(dataset)) for name in dataset[number]["ids"])


ALL = sorted([f"chest/{one['id']}" for one in CHEST] + [f"brain/{one['id']}" for one in BRAIN])


def test_exactly_the_listed_conversations_are_left_out_and_nothing_is_tokenised_again(
    build, corpus: Corpus, tmp_path: Path, logged: list[str]
) -> None:
    before = build(corpus.mixture)
    assert trained_on(before) == ALL
    assert "exclude" not in logged[-1]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tokens").rglob("*")}
    exclude(corpus, "dataset: chest\nid: c3\nimage: 1.png\ndataset: *\nid: 7\nid: nobody\n")
    after = build(corpus.mixture)
    gone = {"chest/c3", "chest/c1", "chest/c6", "chest/7", "brain/7"}
    assert trained_on(after) == [name for name in ALL if name not in gone]
    assert made == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tokens").rglob("*")
    }
    assert after.plan.folder != before.plan.folder
    assert after.plan.excluded().conversations == (4, 1)
    assert "chest: 8 conversations x 1, 4 of them excluded" in logged[-1]
    assert "excluded by the mixture's lists: 5 of 15 conversations" in logged[-1]
    assert (
        "warning: 1 line(s) of the exclude lists name nothing that this stage has: id: nobody"
        in logged[-1]
    )
    assert build(corpus.mixture).plan.folder == after.plan.folder


def test_the_draw_of_all_others_stays(build, corpus: Corpus) -> None:
    text = corpus.mixture.read_text().replace(
        "image_root: images", "image_root: images\n    ratio: 1.5"
    )
    corpus.mixture.write_text(text)
    before = trained_on(build(corpus.mixture, seed=3))
    exclude(corpus, "id: c2\nid: b4\n")
    after = trained_on(build(corpus.mixture, seed=3))
    assert after == [name for name in before if name not in ("chest/c2", "brain/b4")]
    assert len(after) < len(before)


def test_what_is_excluded_is_not_validated_on_either(build, corpus: Corpus) -> None:
    whole = build(corpus.mixture, held_out=0.4)
    held = whole.held_out_part()
    assert held is not None
    one = next(name for name in trained_on(held) if "/c" in name)
    exclude(corpus, f"dataset: chest\nid: {one.removeprefix('chest/')}\n")
    rest = build(corpus.mixture, held_out=0.4)
    assert trained_on(rest) == trained_on(whole)
    part = rest.held_out_part()
    assert part is not None
    assert trained_on(part) == [name for name in trained_on(held) if name != one]
    assert rest.plan.held_out_counts().sum() == whole.plan.held_out_counts().sum() - 1


def test_a_list_that_leaves_nothing_is_said(build, corpus: Corpus) -> None:
    exclude(corpus, "".join(f"image: {name}\n" for name in IMAGES) + "id: 7\n")
    with pytest.raises(
        MixtureError, match="the ratios and the exclude lists leave no conversation"
    ):
        build(corpus.mixture)

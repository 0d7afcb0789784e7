# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.exclusion import Exclusion
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.held_out import HELD_OUT, NEITHER, TRAIN, hashes, nothing_held_out, sides
from gmai_xtuner.data.plan import _rows_of
from tests.toy import Corpus, record

MASK = 2**64 - 1


def slow_hash(text: str) -> int:
    """The same function, one byte after the other in Python's own integers."""
    factor, value, power = 0x9E3779B97F4A7C15, 0x9E3779B97F4A7C15, 1
    for byte in text.encode():
        value = (value + (byte + 1) * power) & MASK
        power = power * factor & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def write_cache(folder: Path, rows: list[tuple[str, list[str]]], *, rows_a_batch: int = 3) -> Path:
    """As much of a token cache as sides are made from."""
    folder.mkdir(parents=True)
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(pa.string()))])
    with (
        pa.OSFile(str(folder / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, schema) as out,
    ):
        for start in range(0, len(rows), rows_a_batch):
            part = rows[start : start + rows_a_batch]
            columns = [
                pa.array([name for name, _ in part], pa.string()),
                pa.array([images for _, images in part], pa.list_(pa.string())),
            ]
            out.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return folder


def test_hash_is_the_same_everywhere_and_for_good():
    texts = ["", "a.png", "a.pnh", "图像/肝脏.png", "x" * 300, "\0", "\0\0", "a.png"]
    array = pa.array(texts, pa.string())
    assert hashes(array).tolist() == [slow_hash(text) for text in texts]
    assert hashes(array[2:5]).tolist() == [slow_hash(text) for text in texts[2:5]]
    assert hashes(pa.array([], pa.string())).tolist() == []
    assert len({slow_hash(text) for text in texts}) == len(texts) - 1
    # Another value here would move images from one side to the other in everyone's runs.
    assert slow_hash("a.png") == 16389314028566253917


def test_names_that_count_up_are_spread_evenly():
    names = pa.array([f"images/{number:07d}.png" for number in range(100_000)])
    shares = np.bincount(hashes(names) >> np.uint64(60), minlength=16) / 100_000
    assert shares == pytest.approx(1 / 16, rel=0.05)
    assert (hashes(names) < np.uint64(0.001 * 2**64)).sum() == pytest.approx(100, abs=40)


def test_conversations_of_an_image_are_on_one_side(tmp_path):
    rows = [(f"q{number}", [f"{number // 5}.png"]) for number in range(500)]
    result = sides(write_cache(tmp_path / "cache", rows), 0.2)
    by_image = result.side.reshape(100, 5)
    assert (by_image == by_image[:, :1]).all()
    assert set(result.side.tolist()) == {TRAIN, HELD_OUT}
    assert 10 <= (by_image[:, 0] == HELD_OUT).sum() <= 30


def test_a_conversation_with_images_of_both_sides_is_on_neither(tmp_path):
    names = [f"{number}.png" for number in range(40)]
    share = 0.5
    held = [name for name in names if slow_hash(name) < share * 2**64]
    kept = [name for name in names if name not in held]
    rows = [
        ("both", [held[0], kept[0]]),
        ("out", [held[0], held[1]]),
        ("in", [kept[0], kept[1], kept[1]]),
        ("in", [kept[2]]),
        ("out", [held[2]]),
    ]
    result = sides(write_cache(tmp_path / "cache", rows), share)
    assert result.side.tolist() == [NEITHER, HELD_OUT, TRAIN, TRAIN, HELD_OUT]


def test_a_conversation_without_images_goes_by_its_id(tmp_path):
    rows = [(f"r{number // 2}", []) for number in range(200)] + [("r0", ["r0"])]
    result = sides(write_cache(tmp_path / "cache", rows), 0.3)
    expected = [HELD_OUT if slow_hash(name) < 0.3 * 2**64 else TRAIN for name, _ in rows]
    assert result.side.tolist() == expected
    assert 20 < sum(expected) < 100


def test_side_depends_on_the_name_and_share_alone(tmp_path):
    rows = [(f"a{number}", [f"{number}.png"]) for number in range(300)]
    one = sides(write_cache(tmp_path / "one", rows), 0.1)
    # Another dataset with other ids, in another order, with more images.
    other_rows = [("b", [f"{number}.png"]) for number in reversed(range(600))]
    other = sides(write_cache(tmp_path / "two", other_rows, rows_a_batch=7), 0.1)
    assert one.side.tolist() == other.side[::-1][:300].tolist()
    # A larger share takes more, and what was held out stays so.
    larger = sides(tmp_path / "one", 0.2)
    assert set(one.rows(HELD_OUT)) < set(larger.rows(HELD_OUT))


def test_at_most_takes_the_same_ones_whatever_else_is_held_out(tmp_path):
    rows = [(f"a{number}", [f"{number}.png"]) for number in range(300)]
    some = sides(write_cache(tmp_path / "cache", rows), 0.1).rows(HELD_OUT, at_most=5)
    more = sides(tmp_path / "cache", 0.3).rows(HELD_OUT, at_most=5)
    assert len(some) == 5
    assert some.tolist() == more.tolist() == sorted(some)
    assert len(sides(tmp_path / "cache", 0.1).rows(HELD_OUT, at_most=1000)) > 5


def test_an_empty_cache_has_no_sides(tmp_path):
    assert sides(write_cache(tmp_path / "cache", []), 0.5).side.tolist() == []


def test_the_smallest_share_that_holds_something_out_is_said_and_does(tmp_path):
    def least(told: str) -> float:
        return float(told.rpartition(" is ")[2])

    # 95 conversations of ten images, as a small hospital's first set.
    rows = [(f"q{number}", [f"scan{number % 10}.png"]) for number in range(95)]
    cache = write_cache(tmp_path / "few", rows, rows_a_batch=40)
    told = nothing_held_out(0.05, [cache], [None])
    assert told.startswith("0.05 of 10 images; hashes of the names decide")
    lowest = min(slow_hash(f"scan{number}.png") for number in range(10)) / 2**64
    assert lowest < least(told) < 1.11 * lowest  # two digits, rounded up
    assert (sides(cache, least(told)).side == HELD_OUT).any()
    assert not (sides(cache, lowest).side == HELD_OUT).any()

    # Without the image that would be held out first; with one of two images, and one without any.
    first = min(range(10), key=lambda number: slow_hash(f"scan{number}.png"))
    mask = np.array([number % 10 == first for number in range(95)])
    other = nothing_held_out(0.05, [cache], [mask])
    assert other.startswith("0.05 of 9 images;")
    assert (sides(cache, least(other)).side[~mask] == HELD_OUT).any()
    assert least(other) > least(told)
    pair = write_cache(tmp_path / "pair", [("both", ["a.png", "scan1.png"]), ("text", [])])
    told = nothing_held_out(0.01, [pair], [None])
    assert told.startswith("0.01 of 2 images and 1 conversation without an image;")
    ends = max(slow_hash("a.png"), slow_hash("scan1.png")), slow_hash("text")
    assert min(ends) / 2**64 < least(told) < 1.11 * min(ends) / 2**64

    one = write_cache(tmp_path / "one", [("q1", ["a.png"]), ("q2", ["a.png"])])
    assert nothing_held_out(0.05, [one], [None]).endswith(
        "No share holds something out and leaves something to train on"
    )


# --- A plan leaves out exactly the conversations that exclude lists name ---


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

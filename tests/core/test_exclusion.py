# SPDX-License-Identifier: Apache-2.0

"""Exclude lists: the meaning of their lines, and the datasets that each concerns."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.exclusion import Exclusion, Named, read_exclusions, read_list
from gmai_xtuner.core.mixture import DatasetEntry, load_mixture


def test_lines_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "\ufeff# a comment\n\n  id: 2d#cls#ct: a b.png \nimage: ./scans//a.png\r\ndataset: x: y\n"
        'id: "two\\nlines"\ndataset: *\nimage: ä.png\n',
        encoding="utf-8",
    )
    assert read_list(path) == [
        Named("id", "2d#cls#ct: a b.png", None),
        Named("image", "scans/a.png", None),
        Named("id", "two\nlines", "x: y"),
        Named("image", "ä.png", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: 1\n4711\n", r"list\.txt, line 2: expected 'id: \.\.\.', .* got '4711'"),
        ("ids: 1", r"line 1: expected"),
        ("image:", r"line 1: expected"),
        ('id: "open', r"line 1: .* is no JSON text"),
    ],
)
def test_a_line_that_means_nothing_is_refused_with_its_number(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(MixtureError, match=message):
        read_list(tmp_path / "list.txt")


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match=r"exclude list .*none\.txt can't be read"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("id: ä".encode("latin-1"))
    with pytest.raises(MixtureError, match=r"latin\.txt is not UTF-8"):
        read_list(tmp_path / "latin.txt")


def entry(name: str, *exclude: Path) -> DatasetEntry:
    return DatasetEntry(name, (), None, None, None, {}, "cut", None, None, exclude)


def test_a_name_for_all_is_known_if_one_dataset_has_it(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "id: a\nid: z\ndataset: two\nid: a\nid: b\ndataset: off\nid: 1\ndataset: no\nid: 2\n"
    )
    read = read_exclusions([entry("one", path), entry("two", path)], known={"one", "two", "off"})
    assert [sorted(part.ids) for part in read.datasets] == [["a", "z"], ["a", "b", "z"]]
    found = [Exclusion(frozenset({"a"})), Exclusion()]
    assert read.unknown(found) == ["id: 2 (no)", "id: b (two)", "id: z"]


def test_a_list_of_one_dataset_concerns_no_other(tmp_path: Path) -> None:
    own, both = tmp_path / "own.txt", tmp_path / "both.txt"
    own.write_text("id: 7\nimage: 0.png\ndataset: one\nid: 8\n")
    both.write_text("dataset: one\nid: 9\n")
    read = read_exclusions([entry("one", both), entry("two", own, both)], known={"one", "two"})
    assert read.datasets == (
        Exclusion(frozenset({"9"})),
        Exclusion(frozenset({"7"}), frozenset({"0.png"})),
    )
    assert read.unknown([Exclusion(), Exclusion()]) == [
        "id: 7 (two)", "id: 9 (one)", "image: 0.png (two)",
    ]  # fmt: skip


def test_order_and_repetition_of_lines_change_no_digest(tmp_path: Path) -> None:
    first, again = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("id: c2\nid: b4\ndataset: gone\nid: 1\n")
    again.write_text("# again\nid: b4\nid: c2\nid: b4\ndataset: gone\nid: 1\n")
    one, other = (read_exclusions([entry("d", path)], known={"d"}) for path in (first, again))
    # Known since the first version: plans made by it are found again.
    assert one.digest == other.digest == "80d93fd622f30f47"
    first.write_text("id: c2\nid: b4\n")
    assert read_exclusions([entry("d", first)], known={"d"}).digest != one.digest


def test_a_list_that_does_not_exist_is_an_error_of_the_mixture(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets:\n  d: {annotations: a.jsonl}\nexclude: gone.txt\n")
    with pytest.raises(MixtureError, match=r"mixture\.yaml:3: .*exclude 'gone.txt' does not exist"):
        load_mixture(mixture)
    (entry,) = load_mixture(mixture, check_files=False).entries
    assert entry.exclude == (tmp_path / "gone.txt",)

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.readers import SourceOptions
from data_tools.readers.files import below, file_below, file_of, files, folder_of
from gmai_xtuner.core.errors import SourceError


def source(root, **keys):
    return SourceOptions(name="s", licence="MIT", root=root, **keys)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "../a.png",
        "a/../../b.png",
        "..\\a.png",
        "/etc/passwd",
        "\\\\host\\a",
        "C:\\a",
        "a\0b",
    ],
)
def test_hostile_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError):
        below(source(tmp_path), name)


def test_a_link_may_lead_to_another_place_of_the_source_but_not_out(tmp_path):
    root, other = tmp_path / "set", tmp_path / "set_of_others"
    for folder in (root, other):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"x")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(other / "a.png")
    (root / "folder").symlink_to(other)
    assert below(source(root), "inside.png").read_bytes() == b"x"
    for name in ("outside.png", "folder/a.png"):
        with pytest.raises(ValueError, match="leads out"):
            below(source(root), name)


def test_backslashes_separate_folders(tmp_path):
    assert below(source(tmp_path), "a\\b.png") == tmp_path / "a/b.png"


def test_files_come_sorted_without_hidden_ones_and_without_following_links(tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden/c.png", "__MACOSX/d.png", "b/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert list(files(source(tmp_path))) == ["a.png", "again", "b/1.png", "b/2.png"]
    assert list(files(source(tmp_path), "b")) == ["b/1.png", "b/2.png"]


def test_a_folder_or_file_that_the_job_names_wrongly(tmp_path):
    (tmp_path / "labels.csv").touch()
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match=r"`table` names the file 'lables.csv'.*'labels.csv'"):
        file_of(source(tmp_path), "lables.csv", key="table")
    with pytest.raises(SourceError, match=r"`images` names the folder 'image'.*'images'"):
        folder_of(source(tmp_path), "image", key="images")
    with pytest.raises(SourceError, match=r"root .* is no folder"):
        file_of(source(tmp_path / "no"), "a", key="table")


def test_a_link_may_leave_the_root_where_the_job_says_so(tmp_path):
    """As git-annex, DVC and the cache of a hub have it: links into a store, and a folder elsewhere."""
    root, store, other = tmp_path / "set", tmp_path / "store", tmp_path / "other"
    for folder in (root, store, other):
        folder.mkdir()
        (folder / "a.png").touch()
    (root / "annexed.png").symlink_to("../store/a.png")
    (root / "elsewhere.png").symlink_to(other / "a.png")
    (root / "folder").symlink_to(store)
    (store / "round").symlink_to(store)
    of = source(root, links=[store])
    assert list(files(of)) == [
        "a.png",
        "annexed.png",
        "elsewhere.png",
        "folder/a.png",
        "folder/round",
    ]
    for name in ("annexed.png", "folder/a.png"):
        assert file_below(of, name) == root / name
        with pytest.raises(ValueError, match="links"):
            file_below(source(root), name)
    with pytest.raises(ValueError, match="leads out"):
        file_below(of, "elsewhere.png")


def test_the_letter_case_of_a_suffix_does_not_matter(tmp_path):
    (tmp_path / "a.PNG").touch()
    (tmp_path / "b.jpg").touch()
    assert file_below(source(tmp_path), "a.png") == tmp_path / "a.PNG"
    assert file_below(source(tmp_path), "b.JPG") == tmp_path / "b.jpg"

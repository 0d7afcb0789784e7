from __future__ import annotations

import pytest

from data_tools.readers.files import below, file_of, files, folder_of, matching
from gmai_xtuner.core.errors import SourceError


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
        below(tmp_path, name)


def test_a_link_may_lead_to_another_place_of_the_source_but_not_out(tmp_path):
    root, other = tmp_path / "set", tmp_path / "set_of_others"
    for folder in (root, other):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"x")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(other / "a.png")
    (root / "folder").symlink_to(other)
    assert below(root, "inside.png").read_bytes() == b"x"
    for name in ("outside.png", "folder/a.png"):
        with pytest.raises(ValueError, match="leads out"):
            below(root, name)


def test_backslashes_separate_folders(tmp_path):
    assert below(tmp_path, "a\\b.png") == tmp_path / "a/b.png"


def test_files_come_sorted_without_hidden_ones_and_without_following_links(tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden/c.png", "__MACOSX/d.png", "b/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert list(files(tmp_path)) == ["a.png", "again", "b/1.png", "b/2.png"]
    assert list(files(tmp_path, "b")) == ["b/1.png", "b/2.png"]


def test_a_folder_or_file_that_the_job_names_wrongly(tmp_path):
    (tmp_path / "labels.csv").touch()
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match=r"`table` names the file 'lables.csv'.*'labels.csv'"):
        file_of(tmp_path, "lables.csv", source="s", key="table")
    with pytest.raises(SourceError, match=r"`images` names the folder 'image'.*'images'"):
        folder_of(tmp_path, "image", source="s", key="images")
    with pytest.raises(SourceError, match=r"root .* is no folder"):
        file_of(tmp_path / "no", "a", source="s", key="table")


def test_templates_find_files_by_known_and_unknown_places(tmp_path):
    for name in ("m/1/a_x.png", "m/2/a_y.png", "m/2/b_x.png", "m/2/ab_x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = matching(tmp_path, "m/{label}/{case}_{part}.png", {"case": "a"})
    assert found == [
        ("m/1/a_x.png", {"case": "a", "label": "1", "part": "x"}),
        ("m/2/a_y.png", {"case": "a", "label": "2", "part": "y"}),
    ]

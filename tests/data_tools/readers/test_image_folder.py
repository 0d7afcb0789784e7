# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.readers import image_folder
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, options, read_all, reasons, write_image


def test_a_folder_a_class(tmp_path):
    for name in ("TUM/b.png", "NORM/a.png", "NORM/case1/c.PNG"):
        write_image(tmp_path / name)
    samples, drops = read_all(image_folder, tmp_path)
    assert [(sample.source_file, boxes(sample)) for sample in samples] == [
        ("NORM/a.png", [("NORM", None)]),
        ("NORM/case1/c.PNG", [("NORM", None)]),
        ("TUM/b.png", [("TUM", None)]),
    ]
    assert drops == []


def test_class_folders_below_others(tmp_path):
    for name in ("train/site1/NORM/a.png", "val/site2/TUM/b.png", "test/site1/NORM/c.png"):
        write_image(tmp_path / name)
    samples, _ = read_all(image_folder, tmp_path, folders=("val", "train/"), label_from="last")
    assert [boxes(sample) for sample in samples] == [[("TUM", None)], [("NORM", None)]]


def test_what_is_no_picture_of_a_class_is_counted(tmp_path):
    write_image(tmp_path / "NORM/a.png")
    write_image(tmp_path / "stray.png")
    (tmp_path / "NORM/notes.txt").write_text("x")
    (tmp_path / "NORM/.DS_Store").write_text("x")
    write_image(tmp_path / "NORM/b.png").rename(tmp_path.parent / "elsewhere.png")
    (tmp_path / "NORM/b.png").symlink_to(tmp_path.parent / "elsewhere.png")
    (tmp_path / "TUM").symlink_to(tmp_path / "NORM")
    samples, drops = read_all(image_folder, tmp_path)
    assert [sample.source_file for sample in samples] == ["NORM/a.png"]
    assert reasons(drops) == {
        "link to a folder, which isn't followed": 1,
        "file in no class folder": 1,
        "not an image file": 1,
        "path outside the source": 1,
    }


def test_a_root_without_class_folders(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(SourceError, match="holds no folder, where one for each class is expected"):
        list(image_folder.units(options(image_folder, tmp_path)))

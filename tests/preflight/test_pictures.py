# SPDX-License-Identifier: Apache-2.0

import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image

from gmai_xtuner.preflight import pictures
from gmai_xtuner.preflight.pictures import _Root, decode_all, find_missing


@pytest.fixture
def root(tmp_path) -> _Root:
    names = [f"d{index % 3}/{index}.png" for index in range(40)]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    halves = [("first", pa.array(names[:25])), ("second", pa.array(names[20:]))]
    return _Root(tmp_path, pa.array(names), halves)


def test_missing_files_and_folders_are_found(root: _Root):
    assert find_missing([root]) == []
    (root.folder / "d0" / "30.png").unlink()
    for path in (root.folder / "d1").iterdir():
        path.unlink()
    (root.folder / "d1").rmdir()
    (root.folder / "d1").touch()  # a file where a folder should be
    missing = find_missing([root])
    found = sorted(int(Path(image.image).stem) for image in missing)
    assert found == sorted([30, *range(1, 40, 3)])
    assert {image.dataset for image in missing} == {"first", "second"}
    assert {image.reason for image in missing} == {"missing_image"}


def test_an_image_of_two_datasets_is_the_firsts(root: _Root):
    assert root.owners(["d0/30.png", "d0/21.png", "d0/0.png"]) == ["second", "first", "first"]
    assert root.owners([]) == []


@pytest.mark.parametrize("look", [find_missing, partial(decode_all, max_pixels=2000)])
def test_datasets_are_searched_once_however_much_is_missing(root: _Root, monkeypatch, look):
    searches = []
    is_in = pictures.pc.is_in

    def counted(*arguments, **options):
        searches.append(options)
        return is_in(*arguments, **options)

    monkeypatch.setattr(pictures, "pc", SimpleNamespace(is_in=counted))
    shutil.rmtree(root.folder)
    bad = look([root])
    assert sorted(image.dataset for image in bad) == ["first"] * 25 + ["second"] * 15
    assert len(searches) == 2  # one a dataset


def test_a_folder_or_a_dead_link_is_no_image(root: _Root):
    path = root.folder / "d0" / "0.png"
    path.unlink()
    path.mkdir()
    link = root.folder / "d0" / "3.png"
    link.unlink()
    link.symlink_to("nowhere")
    alive = root.folder / "d0" / "6.png"
    alive.unlink()
    alive.symlink_to(root.folder / "d0" / "9.png")
    assert [image.image for image in find_missing([root])] == ["d0/0.png", "d0/3.png"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("archive", ["", "zip", "tar"])
def test_bad_images_come_in_order_and_once(root: _Root, workers, archive, monkeypatch):
    (root.folder / "d2" / "23.png").write_bytes(b"no image")
    (root.folder / "d1" / "1.png").unlink()
    Image.new("RGB", (50, 50)).save(root.folder / "d0" / "36.png")
    if archive:
        monkeypatch.setenv("GMAI_CACHE", str(root.folder))
        file = shutil.make_archive(str(root.folder.with_suffix("")), archive, root.folder)
        root = replace(root, folder=Path(file))
    assert [image.image for image in find_missing([root])] == ["d1/1.png"]
    bad = decode_all([root], max_pixels=2000, num_workers=workers)
    assert [(image.image, image.dataset, image.reason) for image in bad] == [
        ("d1/1.png", "first", "missing_image"),
        ("d2/23.png", "first", "unsupported_image"),
        ("d0/36.png", "second", "enormous_image"),
    ]


def test_an_image_that_kills_its_process_is_named(root: _Root, monkeypatch):
    original = pictures.check_image

    def fatal(path, **options) -> None:
        if path.name == "17.png":
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, **options)

    monkeypatch.setattr(pictures, "check_image", fatal)
    (root.folder / "d2" / "20.png").write_bytes(b"no image")  # under way at the same time
    bad = decode_all([root], max_pixels=2000, num_workers=2)
    assert [image.image for image in bad] == ["d2/17.png", "d2/20.png"]
    assert "was killed" in bad[0].problem

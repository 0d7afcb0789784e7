# SPDX-License-Identifier: Apache-2.0

import pytest

from data_tools.readers import SourceOptions
from data_tools.readers.files import below, file_below, file_of, files, folder_of
from data_tools.readers.patterns import fill, paired, pattern, place_names
from gmai_xtuner.core.errors import SourceError
from tests.tables import tables

TABLES = tables(__file__)


def source(root, **keys):
    return SourceOptions(name="s", licence="MIT", root=root, **keys)


@pytest.mark.parametrize("name", TABLES["hostile_names_are_refused"])
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
    assert below(source(root), "a\\b.png") == root / "a/b.png"
    for name in ("outside.png", "folder/a.png"):
        with pytest.raises(ValueError, match="leads out"):
            below(source(root), name)


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
    with pytest.raises(SourceError, match=r"`table` names the file 'images'.*'labels.csv'"):
        file_of(source(tmp_path), "images", key="table")
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
    found = ["a.png", "annexed.png", "elsewhere.png", "folder/a.png", "folder/round"]
    assert list(files(of)) == found
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


# --- patterns ---


def pairs(root, names, images, *masks, labels=None):
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    source = SourceOptions(name="s", licence="MIT", root=root)
    return [
        (one.path, [(path, places.get("label")) for path, places in one.masks])
        for one in paired(source, images, masks, labels=labels)
    ]


@pytest.mark.parametrize(("template", "path", "readings"), TABLES["every_reading_of_a_path"])
def test_every_reading_of_a_path(template, path, readings):
    assert pattern(template).readings(path) == readings
    assert pattern(template).match(path) == (readings[0] if readings else None)


def test_a_pattern_is_filled_with_the_cells_of_a_row():
    template = "{部位}/{image ID:03d}.png"
    assert place_names(template) == ["部位", "image ID"]
    assert fill(template, {"部位": "肝", "image ID": "7"}) == "肝/007.png"
    with pytest.raises(ValueError, match="x7"):
        fill(template, {"部位": "肝", "image ID": "x7"})


def test_files_are_found_by_known_and_unknown_places(tmp_path):
    names = "i/a.png m/1/a_x.png m/2/a_y.png m/2/b_x.png m/2/ab_x.png"
    assert pairs(tmp_path, names, "i/{case}.png", "m/{label}/{case}_{part}.png") == [
        ("i/a.png", [("m/1/a_x.png", "1"), ("m/2/a_y.png", "2")])
    ]


def test_a_path_that_fits_both_patterns_is_of_the_more_exact_one(tmp_path):
    names = "a/ct.nii.gz a/liver.nii.gz a/inferior_vena_cava.nii.gz b/ct.nii.gz b/liver.nii.gz"
    vein = ("a/inferior_vena_cava.nii.gz", "inferior_vena_cava")
    assert pairs(tmp_path, names, "{case}/ct.nii.gz", "{case}/{label}.nii.gz") == [
        ("a/ct.nii.gz", [vein, ("a/liver.nii.gz", "liver")]),
        ("b/ct.nii.gz", [("b/liver.nii.gz", "liver")]),
    ]
    assert pairs(tmp_path / "m", "a.png a_mask.png", "{n}.png", "{n}_mask.png") == [
        ("a.png", [("a_mask.png", None)])
    ]


def test_a_mask_name_that_reads_in_two_ways_is_refused_with_both(tmp_path):
    names = "i/a.png m/a_inferior_vena_cava_1.png"
    patterns = ("i/{case}.png", "m/{case}_{label}_{number}.png")
    with pytest.raises(SourceError, match=r"`masks`.*label 'inferior'.*'inferior_vena'"):
        pairs(tmp_path, names, *patterns)
    found = [("i/a.png", [("m/a_inferior_vena_cava_1.png", "inferior_vena_cava")])]
    assert pairs(tmp_path, names, *patterns, labels={"inferior_vena_cava", "liver"}) == found
    exact = "m/{case}_{label}_{number:d}.png"
    assert pairs(tmp_path, names, patterns[0], exact) == found


def test_a_mask_that_may_be_of_two_images_is_refused_or_told_by_the_labels(tmp_path):
    names = "i/a.png i/a_left.png m/a_left_kidney.png"
    patterns = ("i/{case}.png", "m/{case}_{label}.png")
    with pytest.raises(SourceError, match=r"'left_kidney'.*'kidney'"):
        pairs(tmp_path, names, *patterns)
    assert pairs(tmp_path, names, *patterns, labels={"left_kidney"}) == [
        ("i/a.png", [("m/a_left_kidney.png", "left_kidney")]),
        ("i/a_left.png", []),
    ]
    names = "i/a.png m/a_left_kidney.png"
    assert pairs(tmp_path / "one", names, *patterns) == [
        ("i/a.png", [("m/a_left_kidney.png", "left_kidney")])
    ]


def test_no_file_fits(tmp_path):
    with pytest.raises(SourceError, match=r"fits `images: \{n\}.png`; there are 'a.tif'"):
        pairs(tmp_path, "a.tif", "{n}.png", "{n}_mask.png")

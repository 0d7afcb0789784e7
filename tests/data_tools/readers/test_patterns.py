# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.readers import SourceOptions
from data_tools.readers.patterns import fill, paired, pattern, place_names
from gmai_xtuner.core.errors import SourceError


def pairs(root, names, images, *masks, labels=None):
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    source = SourceOptions(name="s", licence="MIT", root=root)
    return [
        (one.path, [(path, places.get("label")) for path, places in one.masks])
        for one in paired(source, images, masks, labels=labels)
    ]


@pytest.mark.parametrize(
    ("template", "path", "readings"),
    [
        ("{case}.png", "a.PNG", [{"case": "a"}]),
        ("{case}_ct.nii.gz", "a_ct.NII.gz", [{"case": "a"}]),
        ("{image ID:03d}.png", "007.png", [{"image ID": "007"}]),
        ("{image ID:03d}.png", "07.png", []),
        ("{部位}/{n}.png", "肝/1.png", [{"部位": "肝", "n": "1"}]),
        ("{a}/{b}.png", "x/y/z.png", []),
        ("{a:path}/{b}.png", "x/y/z.png", [{"a": "x/y", "b": "z"}]),
        ("{a}_{a}.png", "x_y_x_y.png", [{"a": "x_y"}]),
        ("{a}_{b}.png", "x_y_z.png", [{"a": "x", "b": "y_z"}, {"a": "x_y", "b": "z"}]),
        ("{a}_{b:02d}.png", "x_1_02.png", [{"a": "x_1", "b": "02"}]),
        ("v1.0/{a}.png", "v1x0/a.png", []),
    ],
)
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
    assert pairs(tmp_path, names, "{case}/ct.nii.gz", "{case}/{label}.nii.gz") == [
        (
            "a/ct.nii.gz",
            [("a/inferior_vena_cava.nii.gz", "inferior_vena_cava"), ("a/liver.nii.gz", "liver")],
        ),
        ("b/ct.nii.gz", [("b/liver.nii.gz", "liver")]),
    ]
    assert pairs(tmp_path / "m", "a.png a_mask.png", "{n}.png", "{n}_mask.png") == [
        ("a.png", [("a_mask.png", None)])
    ]


def test_a_mask_name_that_reads_in_two_ways_is_refused_with_both(tmp_path):
    names = "i/a.png m/a_inferior_vena_cava_1.png"
    patterns = ("i/{case}.png", "m/{case}_{label}_{number}.png")
    with pytest.raises(SourceError) as error:
        pairs(tmp_path, names, *patterns)
    assert all(
        text in str(error.value) for text in ("label 'inferior'", "'inferior_vena'", "`masks`")
    )
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

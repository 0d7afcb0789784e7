# SPDX-License-Identifier: Apache-2.0

"""Slides are written here: the value of a pixel says where it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_tools.readers import slide, slide_files
from data_tools.readers.slide_labels import Outline, read_outlines
from data_tools.records import Drop, Sample
from gmai_xtuner.core.errors import Unusable
from tests.data_tools.readers.sets import read_units


def field(width: int, height: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``: red from x, green from y, blue 0, so that all of it is saturated."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 251, y % 241 + 10, np.zeros_like(x)], axis=2).astype(np.uint8)


def write_pyramid(path: Path, pixels: np.ndarray, *, microns: float | None = 0.5) -> Path:
    """Three levels, each half of the one before (every second pixel), in tiles of 64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution: dict[str, Any] = {}
    if microns:
        resolution = {"resolution": (1e4 / microns, 1e4 / microns), "resolutionunit": "CENTIMETER"}
    keys: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, subifds=2, **keys, **resolution)
        for step in (2, 4):
            tiff.write(pixels[::step, ::step], subfiletype=1, **keys)
    return path


def options(root: Path, **keys: Any) -> slide.Options:
    base = {"name": "slides", "root": root, "licence": "CC0", "reader": "slide", "tile": 64}
    return slide.Options.model_validate(base | keys)


def read(root: Path, **keys: Any) -> tuple[list[Sample], list[Drop]]:
    samples, drops, _ = read_units(slide, options(root, **keys))
    return samples, drops


def corners(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    return [(int(sample.part["x"]), int(sample.part["y"])) for sample in samples]


def labels(sample: Sample) -> list[str]:
    return [annotation.label for annotation in sample.annotations]


LAYOUTS: list[dict[str, Any]] = [
    {"tile": (64, 64)},
    {"tile": (64, 64), "compression": "deflate", "predictor": True},
    {"tile": (32, 80), "compression": "lzw"},
    {"rowsperstrip": 7},
    {"rowsperstrip": 7, "bigtiff": True, "compression": "zstd"},
    {"tile": (64, 64), "planarconfig": "separate", "channels_first": True},
    {},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_what_an_ordinary_reader_cuts_out(tmp_path, layout):
    pixels = field(300, 200)
    layout = dict(layout)
    bigtiff = layout.pop("bigtiff", False)
    written = pixels.transpose(2, 0, 1) if layout.pop("channels_first", False) else pixels
    tifffile.imwrite(tmp_path / "a.tif", written, photometric="rgb", bigtiff=bigtiff, **layout)
    opened = slide_files.open_slide(tmp_path / "a.tif")
    assert [(level.width, level.height) for level in opened.levels] == [(300, 200)]
    for x, y, width, height in (
        (0, 0, 300, 200),
        (63, 64, 2, 1),
        (250, 150, 50, 50),
        (5, 7, 100, 90),
    ):
        part = opened.read(0, x, y, width, height)
        assert np.array_equal(part, pixels[y : y + height, x : x + width])
    opened.close()


def test_only_the_tiles_that_are_needed_are_read(tmp_path, monkeypatch):
    write_pyramid(tmp_path / "a.tif", field(640, 640))
    opened = slide_files.open_slide(tmp_path / "a.tif")
    read_tiles = []
    plain = tifffile.FileHandle.read

    def counting(self: Any, size: int = -1, /) -> bytes:
        read_tiles.append(size)
        return plain(self, size)

    monkeypatch.setattr(tifffile.FileHandle, "read", counting)
    opened.read(0, 100, 100, 64, 64)
    assert len(read_tiles) == 4  # it touches four of a hundred
    opened.read(0, 128, 128, 64, 64)
    assert len(read_tiles) == 4  # those are still there
    opened.close()


def test_the_grid_covers_the_tissue_and_counts_the_rest(tmp_path):
    pixels = np.full((200, 300, 3), 245, dtype=np.uint8)  # glass
    pixels[:, :128] = field(128, 200)  # the two left columns of tiles are tissue
    pixels[64:128, 128:160] = (200, 60, 120)  # half of the tile at 128, 64
    write_pyramid(tmp_path / "normal/a.tif", pixels)
    samples, drops = read(tmp_path, min_tissue=0.5)
    tissue = [(0, 0), (64, 0), (0, 64), (64, 64), (128, 64), (0, 128), (64, 128)]
    assert corners(samples) == tissue
    assert len(drops) == 4 * 3 - 7
    assert {drop.reason for drop in drops} == {"tile with too little tissue"}
    for sample in samples:
        x, y = corners([sample])[0]
        assert np.array_equal(sample.image, pixels[y : y + 64, x : x + 64])
        assert labels(sample) == ["normal"]
        assert sample.group == sample.source_file == "normal/a.tif"
    samples, _ = read(tmp_path, min_tissue=0.51)
    assert corners(samples) == [corner for corner in tissue if corner != (128, 64)]
    samples, drops = read(tmp_path, min_tissue=0)
    assert len(samples) == 12
    assert not drops


def test_fluorescence_is_bright_on_dark(tmp_path):
    pixels = np.zeros((64, 128), dtype=np.uint16)
    pixels[:, 64:] = 40_000
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), photometric="minisblack")
    (sample,), drops = read(tmp_path, background="dark")
    assert corners([sample]) == [(64, 0)]
    assert np.array_equal(sample.image, np.full((64, 64), 40_000 >> 8))
    assert len(drops) == 1


def test_scales_are_read_from_the_level_that_has_them(tmp_path):
    pixels = field(512, 512)
    write_pyramid(tmp_path / "a.tif", pixels, microns=0.5)
    keys = {"min_tissue": 0}
    (first, *_), _ = read(tmp_path, level=1, **keys)
    assert np.array_equal(first.image, pixels[:128:2, :128:2])
    samples, _ = read(tmp_path, microns_per_pixel=2.0, **keys)
    assert corners(samples) == [(0, 0), (256, 0), (0, 256), (256, 256)]
    assert np.array_equal(samples[3].image, pixels[256::4, 256::4])
    assert samples[3].preprocessing["level"] == "2"
    assert samples[3].preprocessing["microns a pixel"] == "2"
    # 0.75 lies between the levels: the finer one, 96 pixels of it, is made smaller.
    (first, *_), _ = read(tmp_path, microns_per_pixel=0.75, **keys)
    expected = Image.fromarray(pixels[:96, :96]).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(first.image, np.asarray(expected))
    (first, *_), _ = read(tmp_path, magnification=10, slide_magnification=20, **keys)
    assert np.array_equal(first.image, pixels[:128:2, :128:2])


def test_scales_that_a_slide_does_not_have_are_counted(tmp_path):
    write_pyramid(tmp_path / "a.tif", field(256, 256), microns=None)
    finer = {"microns_per_pixel": 0.25, "slide_microns_per_pixel": 0.5}
    for keys, reason in (
        ({"microns_per_pixel": 1.0}, "slide doesn't say its microns a pixel"),
        ({"magnification": 20}, "slide doesn't say its magnification"),
        ({"level": 3}, "slide without this level"),
        (finer, "slide is coarser than asked for"),
        ({"tile": 512}, "slide smaller than a tile"),
    ):
        samples, drops = read(tmp_path, **keys)
        assert (samples, [drop.reason for drop in drops]) == ([], [reason])


def test_ome_tiff_and_a_pyramid_in_it_say_their_scale(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        pixels = field(256, 128)
        metadata = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm"}
        tiff.write(pixels, tile=(64, 64), subifds=1, photometric="rgb", metadata=metadata)
        tiff.write(pixels[::2, ::2], tile=(64, 64), subfiletype=1, photometric="rgb")
    opened = slide_files.open_slide(tmp_path / "a.ome.tif")
    assert opened.microns_per_pixel == 0.25
    assert [level.downsample for level in opened.levels] == [1.0, 2.0]
    opened.close()


def test_a_scanners_file_is_read_by_openslide(tmp_path):
    pixels = field(256, 128)
    description = "Aperio Image Library v10\r\n256x128 (64x64)|AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(tmp_path / "a.svs") as tiff:
        keys: dict[str, Any] = {"photometric": "rgb", "metadata": None, "description": description}
        tiff.write(pixels, tile=(64, 64), **keys)
        tiff.write(pixels[::2, ::2], tile=(64, 64), **keys)
    opened = slide_files.open_slide(tmp_path / "a.svs")
    assert isinstance(opened, slide_files._Scanner)
    assert (opened.microns_per_pixel, opened.magnification) == (0.499, 20.0)
    assert np.array_equal(opened.read(0, 70, 30, 64, 64), pixels[30:94, 70:134])
    opened.close()
    samples, _ = read(tmp_path, magnification=10, min_tissue=0)
    assert corners(samples) == [(0, 0), (128, 0)]
    assert np.array_equal(samples[1].image, pixels[::2, 128::2])


def test_at_most_so_many_tiles_and_always_the_same(tmp_path):
    write_pyramid(tmp_path / "a.tif", field(640, 640))
    first, _ = read(tmp_path, max_tiles=10)
    again, _ = read(tmp_path, max_tiles=10)
    every, _ = read(tmp_path)
    assert len(every) == 100
    assert len(first) == 10
    assert corners(first) == corners(again)
    assert corners(first) == [corner for corner in corners(every) if corner in set(corners(first))]
    assert corners(first) != corners(every)[:10]


def test_a_table_of_tiles(tmp_path):
    pixels = field(256, 256)
    write_pyramid(tmp_path / "slides/a.tif", pixels)
    (tmp_path / "t.csv").write_text(
        "file,label,x,y,left,top,right,bottom\n"
        "a,tumour,10,20,1,2,30,40\na,vessel,10,20,5,5,9,9\na.tif,stroma,192,192,,,,\n"
        "a,stroma,193,192,,,,\na,stroma,one,1,,,,\nb,stroma,1,1,,,,\n"
    )
    columns = {
        "x": "x",
        "y": "y",
        "box": {"x1": "left", "y1": "top", "x2": "right", "y2": "bottom"},
    }
    samples, drops = read(tmp_path / "slides", table=tmp_path / "t.csv", columns=columns)
    assert sorted(corners(samples)) == [(10, 20), (192, 192)]
    found = dict(zip(corners(samples), samples, strict=True))
    assert np.array_equal(found[10, 20].image, pixels[20:84, 10:74])
    assert [(a.label, a.box) for a in found[10, 20].annotations] == [
        ("tumour", (1, 2, 30, 40)),
        ("vessel", (5, 5, 9, 9)),
    ]
    assert [(a.label, a.box) for a in found[192, 192].annotations] == [("stroma", None)]
    assert sorted(drop.reason for drop in drops) == [
        "row of the table can't be read",
        "slide of the table not found",
        "tile outside the slide",
    ]


def test_the_slides_class_from_a_table(tmp_path):
    for name in ("a", "b"):
        write_pyramid(tmp_path / f"{name}.tif", field(64, 64))
    (tmp_path / "t.csv").write_text("file,label\na,adenocarcinoma\n")
    (sample,), drops = read(tmp_path, table=tmp_path / "t.csv")
    assert labels(sample) == ["adenocarcinoma"]
    assert [(drop.where, drop.reason) for drop in drops] == [
        ("b.tif", "slide without a row in the table")
    ]


SQUARE = [[32, 16], [96, 16], [96, 48], [32, 48], [32, 16]]
HOLE = [[40, 20], [60, 20], [60, 40], [40, 40], [40, 20]]


def write_geojson(path: Path) -> None:
    geometry = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
    feature = {"geometry": geometry, "properties": {"classification": {"name": "Tumor"}}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def write_asap(path: Path) -> None:
    def outline(group: str, points: list[list[int]]) -> str:
        made = (
            f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points[:-1])
        )
        kind = f'Annotation Name="a" Type="Polygon" PartOfGroup="{group}"'
        return f"<{kind}><Coordinates>{''.join(made)}</Coordinates></Annotation>"

    path.write_text(
        f"<ASAP_Annotations><Annotations>{outline('Tumor', SQUARE)}{outline('not', HOLE)}"
        "</Annotations></ASAP_Annotations>"
    )


@pytest.mark.parametrize("suffix", ["geojson", "xml"])
def test_outlines_become_masks_of_the_tiles(tmp_path, suffix):
    write_pyramid(tmp_path / "a.tif", field(192, 64))
    (write_geojson if suffix == "geojson" else write_asap)(tmp_path / f"a.{suffix}")
    samples, drops = read(
        tmp_path, regions=f"{{stem}}.{suffix}", exclude=["not"] if suffix == "xml" else []
    )
    assert corners(samples) == [(0, 0), (64, 0)]
    assert [drop.reason for drop in drops] == ["tile without a region"]  # the one at 128
    whole = np.zeros((64, 192), dtype=bool)
    whole[16:48, 32:96] = True
    whole[20:40, 40:60] = False
    for sample in samples:
        (annotation,) = sample.annotations
        assert annotation.label == "Tumor"
        x = int(sample.part["x"])
        assert annotation.mask is not None
        assert np.array_equal(annotation.mask, whole[:, x : x + 64])


def test_outlines_are_filled_like_an_independent_library_does():
    from skimage.draw import polygon2mask

    generator = np.random.default_rng(0)
    touched = 0
    for _ in range(50):
        ring = generator.uniform(-40, 120, size=(int(generator.integers(3, 12)), 2))
        mask = Outline("a", (ring,)).mask(10, 20, 1.5, (64, 48))
        # skimage fills pixels whose number lies inside, (row, column); half a pixel back is the middle.
        points = (ring - (10, 20)) / 1.5 - 0.5
        expected = polygon2mask((48, 64), points[:, ::-1])
        assert np.array_equal(np.zeros((48, 64), bool) if mask is None else mask, expected)
        touched += bool(expected.any())
    assert touched > 30


def test_tiles_labelled_by_the_region_that_covers_them(tmp_path):
    write_pyramid(tmp_path / "a.tif", field(256, 64))
    box = [[0, 0], [70, 0], [70, 64], [0, 64], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [box]}
    feature = {"type": "Feature", "geometry": geometry, "properties": {"name": "tumour"}}
    (tmp_path / "a.geojson").write_text(json.dumps([feature]))
    samples, drops = read(
        tmp_path, regions="{stem}.geojson", regions_as="tile", outside="no tumour"
    )
    assert [(corners([s])[0], labels(s)) for s in samples] == [
        ((0, 0), ["tumour"]),
        ((128, 0), ["no tumour"]),
        ((192, 0), ["no tumour"]),
    ]
    assert [(drop.reason, drop.where) for drop in drops] == [
        ("tile with too little of a region", "a.tif x 64 y 0")
    ]
    assert all(annotation.mask is None for s in samples for annotation in s.annotations)


@pytest.mark.parametrize("smaller", [1, 2, 4])
def test_a_mask_of_the_slide_gives_the_regions_of_a_tile(tmp_path, smaller):
    write_pyramid(tmp_path / "a.tif", field(256, 128))
    values = np.zeros((128, 256), dtype=np.uint8)
    values[32:96, 96:160] = 2
    values[0:16, 0:16] = 1
    tifffile.imwrite(tmp_path / "a_mask.tif", values[::smaller, ::smaller], tile=(16, 16))
    samples, _ = read(tmp_path, mask="{stem}_mask.tif", level=0)
    found = dict(zip(corners(samples), samples, strict=True))
    assert sorted(found) == [(0, 0), (64, 0), (64, 64), (128, 0), (128, 64)]
    for (x, y), sample in found.items():
        tile = values[y : y + 64, x : x + 64]
        assert labels(sample) == [str(value) for value in np.unique(tile) if value]
        for annotation in sample.annotations:
            assert np.array_equal(annotation.mask, tile == int(annotation.label))
    (sample, _), _ = read(tmp_path, mask="{stem}_mask.tif", level=1)
    assert labels(sample) == ["1", "2"]
    assert np.array_equal(sample.annotations[1].mask, values[::2, :128:2] == 2)


def test_masks_that_are_none_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        write_pyramid(tmp_path / f"{name}.tif", field(128, 128))
    tifffile.imwrite(tmp_path / "a_mask.tif", np.zeros((128, 200), dtype=np.uint8))
    tifffile.imwrite(tmp_path / "b_mask.tif", np.zeros((128, 128, 3), dtype=np.uint8))
    samples, drops = read(tmp_path, mask="{stem}_mask.tif")
    assert not samples
    assert [drop.reason for drop in drops] == [
        "mask doesn't fit the slide",
        "mask of the slide isn't a label map",
        "slide without its regions",
    ]


def test_broken_slides_are_counted_and_the_others_come(tmp_path):
    good = write_pyramid(tmp_path / "x/b.tif", field(128, 128)).read_bytes()
    (tmp_path / "x/a.tif").write_bytes(b"not a slide")
    (tmp_path / "x/c.svs").write_bytes(b"")
    tifffile.imwrite(tmp_path / "x/d.tif", np.zeros((5, 128, 128), dtype=np.uint8))
    tifffile.imwrite(tmp_path / "x/e.tif", field(128, 128), tile=(64, 64), compression="deflate")
    data = bytearray((tmp_path / "x/e.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "x/e.tif") as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[1], page.databytecounts[1]
    data[offset : offset + count] = bytes(count)
    (tmp_path / "x/e.tif").write_bytes(data)
    tifffile.imwrite(tmp_path / "x/f.tif", np.zeros((128, 128), dtype=np.float32))
    assert good
    samples, drops = read(tmp_path, min_tissue=0)
    assert len([sample for sample in samples if sample.source_file == "x/b.tif"]) == 4
    assert len([sample for sample in samples if sample.source_file == "x/e.tif"]) == 3
    assert [(drop.where, drop.reason) for drop in drops] == [
        ("x/a.tif", "slide can't be read"),
        ("x/c.svs", "slide can't be read"),
        ("x/d.tif", "slide is a stack"),
        ("x/e.tif x 64 y 0", "part of the slide can't be read"),
        ("x/f.tif", "slide of an unsupported kind"),
    ]


def test_files_of_outlines_that_are_none(tmp_path):
    texts = {
        "a.geojson": "{",
        "c.geojson": '[{"geometry": {"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}}]',
        "d.xml": "<html/>",
        "e.xml": "<ASAP",
        "f.geojson": '[{"geometry": {"type": "Polygon", "coordinates": [[[1, "x"], [3, 4]]]}}]',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Unusable):
            read_outlines(tmp_path / name)
    write_pyramid(tmp_path / "a.tif", field(64, 64))
    samples, drops = read(tmp_path, regions="{stem}.geojson")
    assert not samples
    assert [drop.reason for drop in drops] == ["regions of the slide can't be read"]


POINT = {"geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {"name": "cell"}}
BOX = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((0, 0), (64, 0), (64, 64), (0, 64)))
HOLE_IN_IT = BOX.replace("64", "32")
APERIO = f"""<Annotations><Annotation Name="tumour"><Regions><Region Type="0">{BOX}</Region>
<Region Type="0" NegativeROA="1">{HOLE_IN_IT}</Region></Regions></Annotation>
<Annotation Name="cell"><Regions><Region Type="3"><Vertex X="1" Y="2"/></Region></Regions></Annotation>
</Annotations>"""
ASAP = """<ASAP_Annotations><Annotations><Annotation Name="cell" Type="Dot" PartOfGroup="None">
<Coordinates><Coordinate Order="0" X="1" Y="2"/></Coordinates></Annotation><Annotation Name="tumour"
Type="Polygon" PartOfGroup="None"><Coordinates><Coordinate Order="0" X="0" Y="0"/>
<Coordinate Order="1" X="64" Y="0"/><Coordinate Order="2" X="0" Y="64"/></Coordinates></Annotation>
</Annotations></ASAP_Annotations>"""
TRIANGLE = {"type": "Polygon", "coordinates": [[[0, 0], [64, 0], [0, 64]]]}
FEATURES = [POINT, {"geometry": TRIANGLE, "properties": {"name": "tumour"}}]


@pytest.mark.parametrize(
    ("name", "text", "area"),
    [
        ("a.xml", APERIO, 64 * 64 - 32 * 32),
        ("a.xml", ASAP, 64 * 63 // 2),
        ("a.geojson", json.dumps(FEATURES), 64 * 63 // 2),
    ],
)
def test_marks_that_enclose_nothing_are_lost_and_negative_regions_cut_out(
    tmp_path, name, text, area
):
    write_pyramid(tmp_path / "a.tif", field(64, 64))
    (tmp_path / name).write_text(text)
    (sample,), (drop,), lacking = read_units(slide, options(tmp_path, regions="{stem}" + name[1:]))
    assert [(a.label, a.mask.sum()) for a in sample.annotations] == [("tumour", area)]
    assert (drop.reason, lacking) == ("mark on the slide that encloses nothing", [("cell",)])


def test_a_dicom_slide_is_its_largest_file_and_others_are_none(tmp_path, monkeypatch):
    from data_tools.readers.dicom_headers import WHOLE_SLIDE
    from gmai_xtuner.core.imaging import dicom

    found = {"a/label.dcm": (WHOLE_SLIDE, "1"), "a/level.dcm": (WHOLE_SLIDE, "1")}
    found |= {"b/level.dcm": (WHOLE_SLIDE, "1"), "b/ct.dcm": ("1.2", "2"), "b/x.svs": ("", "")}
    for size, name in enumerate(found):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    monkeypatch.setattr(dicom, "open_dataset", lambda path, header_only: path)
    monkeypatch.setattr(
        dicom,
        "header_of",
        lambda _, name: SimpleNamespace(sop_class=found[name][0], series=found[name][1]),
    )
    assert slide._chosen(None, tmp_path, list(found)) == ["a/level.dcm", "b/level.dcm", "b/x.svs"]

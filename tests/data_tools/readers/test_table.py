# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.readers import rows, table
from data_tools.readers.rows import grouped, read_table
from data_tools.records import Sample
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, incomplete, options, read_all, reasons, write_image

CORNERS = {"x1": "x1", "y1": "y1", "x2": "x2", "y2": "y2"}


def write_rows(root: Path, text: str, *, images: str = "ab", name: str = "t.csv") -> Path:
    for image in images:
        write_image(root / f"{image}.png")
    (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("header", "cells", "box"),
    [
        ("x1,y1,x2,y2", "2,3,20,25", CORNERS),
        ("y2,x2,y1,x1", "25,20,3,2", CORNERS),
        ("cx,cy,w,h", "11,14,18,22", {"cx": "cx", "cy": "cy", "width": "w", "height": "h"}),
        ("x,y,w,h", "2,3,18,22", {"x1": "x", "y1": "y", "width": "w", "height": "h"}),
        ("x1,y1,x2,y2", "2,3,19,24", CORNERS | {"last_pixel_inside": True}),
        ("x1,y1,x2,y2", "0.05,0.1,0.5,0.83333333", CORNERS | {"unit": "fractions"}),
        ("b", '"[2, 3, 20, 25]"', {"column": "b", "order": ["x1", "y1", "x2", "y2"]}),
        ("b", "2 20 3 25", {"column": "b", "order": ["x1", "x2", "y1", "y2"]}),
    ],
)
def test_boxes_in_every_form_are_the_same_box(tmp_path, header, cells, box):
    write_rows(tmp_path, f"file,l,{header}\na.png,nodule,{cells}\n")
    (sample,), drops = read_all(table, tmp_path, table="t.csv", image="file", label="l", box=box)
    assert drops == []
    ((label, found),) = boxes(sample)
    assert (label, found) == ("nodule", pytest.approx((2, 3, 20, 25), abs=1e-5))


@pytest.mark.parametrize(
    "box",
    [
        {"x1": "a", "y1": "b", "x2": "c"},
        {"x1": "a", "cx": "b", "y1": "c", "y2": "d"},
        {**CORNERS, "width": "w"},
        {"column": "b"},
        {**CORNERS, "column": "b", "order": ["x1", "y1", "x2", "y2"]},
        {"cx": "a", "cy": "b", "width": "c", "height": "d", "last_pixel_inside": True},
    ],
)
def test_boxes_that_are_not_fixed_are_refused(tmp_path, box):
    with pytest.raises(ValidationError):
        options(table, tmp_path, table="t.csv", image="file", label="l", box=box)


def test_scattered_rows_of_a_picture_are_one_sample(tmp_path):
    rows = "a,n,1,1,5,5\nb,m,,,,\na,n,6,6,9,9\nb,m,,,,\na,k,1,1,5,5\n"
    write_rows(tmp_path, "f,l,x1,y1,x2,y2\n" + rows)
    samples, drops = read_all(
        table, tmp_path, table="t.csv", image="f", image_suffix=".png", label="l", box=CORNERS
    )
    assert [boxes(sample) for sample in samples] == [
        [("n", (1, 1, 5, 5)), ("n", (6, 6, 9, 9)), ("k", (1, 1, 5, 5))],
        [("m", None)],
    ]
    assert [(drop.reason, drop.where) for drop in drops] == [
        ("duplicate row", "b.png, t.csv line 5")
    ]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_rows_come_together_in_the_order_of_their_first(tmp_path_factory, keys):
    """Cells span lines, so that rows are not lines."""
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["k", "n"], *([key, f"{n}\nü,"] for n, key in enumerate(keys))])
    opened = read_table(path, ["n", "k"], source="s")
    strays, *found = grouped(opened, key=lambda row: row.cells["k"], wanted=lambda row: True)
    assert strays == []
    expected = {key: [n for n, other in enumerate(keys) if other == key] for key in keys}
    assert [[int(row.cells["n"].split("\n")[0]) for row in rows] for rows in found] == list(
        expected.values()
    )
    assert all(row.cells["n"].endswith("\nü,") for rows in found for row in rows)
    assert [row.line for rows in found for row in rows] == [
        2 + 2 * n for numbers in expected.values() for n in numbers
    ]


def test_labels_in_one_cell_several_columns_and_one_hot(tmp_path):
    write_rows(tmp_path, "f,l,m,Edema,Mass\na.png,n | k,o,1.0,0\nb.png,,n,0,0\n")
    keys = {"table": "t.csv", "image": "f"}
    samples, _ = read_all(table, tmp_path, **keys, label=("l", "m"), label_separator="|")
    assert [boxes(sample) for sample in samples] == [
        [("n", None), ("k", None), ("o", None)],
        [("n", None)],
    ]
    samples, _ = read_all(
        table, tmp_path, **keys, one_hot={"Edema": "edema", "Mass": "mass"}, nothing="no finding"
    )
    assert [boxes(sample) for sample in samples] == [[("edema", None)], [("no finding", None)]]


def test_an_unclear_cell_drops_the_picture(tmp_path):
    """A finding that may be there is not one that is absent."""
    write_rows(tmp_path, "f,Edema,Mass\na.png,1,-1\nb.png,1,\n")
    samples, drops = read_all(table, tmp_path, table="t.csv", image="f", one_hot=("Edema", "Mass"))
    assert samples == []
    assert reasons(drops) == {"unclear cell of a label's column": 2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("c.png,n,,,,", "no such image file"),
        ("../t/a.png,n,,,,", "path outside the source"),
        ("/a.png,n,,,,", "path outside the source"),
        (",n,,,,", "no image name"),
        ("nan,n,,,,", "no image name"),
        ("a.png,NaN,,,,", "no label"),
        ("a.png,n,1,2,3,", "incomplete box"),
        ("a.png,n,1,2,3,x", "box that can't be read"),
        ("a.png,n,1,2,3,inf", "box that can't be read"),
        ("a.png,n,1,2,3", "row with another number of cells than the header"),
        ("a.png,n,1,2,3,4,5", "row with another number of cells than the header"),
        ('a.png,"n"m,1,2,3,4', "row that can't be read"),
    ],
)
def test_a_bad_row_is_counted_and_the_next_is_read(tmp_path, row, reason):
    write_rows(tmp_path, f"f,l,x1,y1,x2,y2\n{row}\nb.png,n,1,2,3,4\n")
    samples, drops = read_all(table, tmp_path, table="t.csv", image="f", label="l", box=CORNERS)
    assert [boxes(sample) for sample in samples] == [[("n", (1, 2, 3, 4))]]
    assert reasons(drops) == {reason: 1}
    assert "t.csv line 2" in drops[0].where


def test_fractions_above_one_are_counted(tmp_path):
    write_rows(tmp_path, "f,l,x1,y1,x2,y2\na.png,n,0.1,0.1,1.2,0.5\nb.png,n,0.1,0.1,20,0.5\n")
    samples, drops = read_all(
        table, tmp_path, table="t.csv", image="f", label="l", box=CORNERS | {"unit": "fractions"}
    )
    assert (samples, reasons(drops)) == ([], {"fraction below 0 or above 1": 2})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("a.png,n,p1\na.png,m,p1", "image listed twice with different labels"),
        ("a.png,n,p1\na.png,n,p2", "image listed twice with different values"),
    ],
)
def test_rows_that_contradict_each_other_drop_the_picture(tmp_path, rows, reason):
    write_rows(tmp_path, f"f,l,p\n{rows}\nb.png,n,p1\nb.png,n,p1\n")
    keys = {"table": "t.csv", "image": "f", "label": "l", "group_column": "p"}
    samples, drops = read_all(table, tmp_path, **keys)
    assert [(sample.source_file, sample.group) for sample in samples] == [("b.png", "p1")]
    assert reasons(drops) == {reason: 1, "duplicate row": 1}
    if "labels" in reason:
        samples, _ = read_all(table, tmp_path, **keys, row_is="finding")
        assert boxes(samples[0]) == [("n", None), ("m", None)]


def test_splits(tmp_path):
    write_rows(tmp_path, "f,l,s\na.png,n,train\nb.png,n,test\n")
    keys = {"table": "t.csv", "image": "f", "label": "l", "split_column": "s"}
    samples, drops = read_all(table, tmp_path, **keys, splits=("test",))
    assert ([sample.source_file for sample in samples], drops) == (["b.png"], [])
    for splits in (("dev",), ("test", "dev")):
        with pytest.raises(SourceError, match=r"'dev'.* there are 'train', 'test'"):
            read_all(table, tmp_path, **keys, splits=splits)


def test_the_same_table_in_every_format(tmp_path):
    import openpyxl

    rows = [["f", "l", "x1", "y1", "x2", "y2"], ["a", "µ", 1, 2, 3, 4], ["b", "n", 5, 6, 7, 8.5]]
    text = "\n".join(",".join(str(cell) for cell in row) for row in rows)
    write_rows(tmp_path, text)
    (tmp_path / "bom.csv").write_text(text, encoding="utf-8-sig")
    (tmp_path / "windows.csv").write_bytes(text.replace("\n", "\r\n").encode("cp1252"))
    (tmp_path / "wide.csv").write_bytes(text.encode("utf-16"))
    (tmp_path / "t.tsv").write_text(text.replace(",", "\t"), encoding="utf-8")
    (tmp_path / "semicolon.csv").write_text(text.replace(",", ";"), encoding="utf-8")
    objects = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, objects)))
    book = openpyxl.Workbook()
    book.active.title = "notes"
    sheet = book.create_sheet("labels")
    for row in rows:
        sheet.append(row)
    book.save(tmp_path / "t.xlsx")
    keys = {"image": "{f}.png", "label": "l", "box": CORNERS}
    for name, further in {
        "t.csv": {},
        "bom.csv": {},
        "windows.csv": {"encoding": "cp1252"},
        "wide.csv": {"encoding": "utf-16"},
        "t.tsv": {},
        "semicolon.csv": {"delimiter": ";"},
        "t.jsonl": {},
        "t.xlsx": {"sheet": "labels"},
    }.items():
        samples, drops = read_all(table, tmp_path, table=name, **keys, **further)
        assert [boxes(sample) for sample in samples] == [
            [("µ", (1, 2, 3, 4))],
            [("n", (5, 6, 7, 8.5))],
        ], name
        assert drops == []
    with pytest.raises(SourceError, match=r"no sheet 'label'; there are 'notes', 'labels'"):
        read_all(table, tmp_path, table="t.xlsx", sheet="label", **keys)


def test_lists_and_broken_lines_of_jsonl(tmp_path):
    lines = [
        '{"f": "a.png", "l": ["n", "m"]}',
        "{",
        "[1]",
        '{"f": "b.png", "l": 3.0}',
        '{"f": "b.png"}',
    ]
    write_rows(tmp_path, "\n".join(lines), name="t.jsonl")
    samples, drops = read_all(table, tmp_path, table="t.jsonl", image="f", label="l")
    assert [boxes(sample) for sample in samples] == [[("n", None), ("m", None)], [("3", None)]]
    assert reasons(drops) == {"row that is no JSON object": 2, "no label": 1}


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (b"file,label\na.png,n\n", {"image": "File"}, r"no column 'File' \(did you mean 'file'\?"),
        (b"file,label\na.png,n\n", {"image": "q"}, "There are 'file', 'label'"),
        (b"file,label,label\na.png,n,m\n", {}, "has 2 columns 'label'"),
        (b"", {}, "is empty"),
        (b"file,label\n", {}, "has no row"),
        (
            b"file,label\na.png,n\nb.png,\xe4\n",
            {},
            r"line 3: byte 25 \(0xe4\) is not utf-8.*cp1252",
        ),
        (b'file,label\na.png,"n\nb.png,n\n', {}, "line 2: a cell begins with a quote"),
        (b"file,label\na.png,n\n", {"encoding": "utf9"}, "is no encoding that Python knows"),
        (b"file,label\na.png,n\n", {"format": "excel"}, "is no Excel file"),
        (b"file,label\na.png,n\n", {"table": "s.csv"}, "names the file 's.csv'.*'t.csv'"),
        (b"file,label\na.png,n\n", {"table": "../t.csv"}, "leads out of the source's root"),
    ],
)
def test_a_table_that_is_wrong_as_a_whole(tmp_path, content, keys, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_all(table, tmp_path, **{"table": "t.csv", "image": "file", "label": "label"} | keys)


def test_units_hold_few_pictures_and_can_be_pickled(tmp_path):
    rows = "".join(f"{number}.png,n\n" for number in range(100))
    write_rows(tmp_path, "f,l\n" + rows, images="")
    chosen = options(table, tmp_path, table="t.csv", image="f", label="l")
    units = list(table.units(chosen))
    assert [len(unit.payload[1]) for unit in units] == [32, 32, 32, 4]
    assert len({unit.key for unit in units}) == 4
    assert units == list(table.units(chosen)) == pickle.loads(pickle.dumps(units))


def test_a_folder_of_dicom_files_and_a_table_of_labels(tmp_path, shared_data):
    pytest.importorskip("data_tools.readers.dicom")
    (tmp_path / "a.dcm").write_bytes((shared_data / "dicom_samples/CT_small.dcm").read_bytes())
    write_rows(tmp_path, "f,l\na.dcm,phantom\n", images="")
    (sample,), drops = read_all(table, tmp_path, table="t.csv", image="f", label="l")
    assert drops == []
    assert isinstance(sample, Sample)
    assert (sample.modality, sample.image.shape) == ("CT", (128, 128))
    assert boxes(sample) == [("phantom", None)]


MILLION = """
import re, sys
from pathlib import Path
from data_tools.readers import rows, table
from gmai_xtuner.core.errors import SourceError
from gmai_xtuner.core.errors import SourceError
options = table.Options(name="s", licence="x", reader="table", root=Path(sys.argv[1]), table="t.csv",
    image="file", label="label", box=dict(x1="x1", y1="y1", x2="x2", y2="y2"))
print(sum(len(unit.payload[1]) for unit in table.units(options)),
      int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
def test_a_million_scattered_rows_stay_under_300_mb(tmp_path):
    with (tmp_path / "t.csv").open("w") as file:
        file.write("file,label,x1,y1,x2,y2\n")
        for number in range(1_000_000):
            file.write(f"images/train/case_{number % 500_000:08d}.png,nodule,1,2,30,40\n")
    result = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows, megabytes = map(int, result.stdout.split())
    assert rows == 1_000_000
    assert megabytes < 300


def test_memory_does_not_grow_with_cells(tmp_path):
    """What stays in memory is 16 bytes a row, however long the rows are."""
    (tmp_path / "t.csv").write_text(
        "f,l\n" + "".join(f"{number},{'x' * 2000}\n" for number in range(3000))
    )
    chosen = options(table, tmp_path, table="t.csv", image="f", label="l")
    tracemalloc.start()
    count = sum(len(unit.payload[1]) for unit in table.units(chosen))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 1_500_000  # the cells have 6 MB


def test_a_finding_whose_box_cannot_be_read_is_named(tmp_path):
    """And only its own image lacks it, though a unit holds several."""
    rows = "a.png,nodule,2,3,x,25\na.png,heart,2,3,20,25\nb.png,heart,2,3,20,25\n"
    write_rows(tmp_path, f"file,l,x1,y1,x2,y2\n{rows}")
    keys = {"table": "t.csv", "image": "file", "label": "l", "box": CORNERS}
    samples, drops = read_all(table, tmp_path, **keys)
    assert reasons(drops) == {"box that can't be read": 1}
    assert [[label for label, _ in boxes(sample)] for sample in samples] == [["heart"]] * 2
    assert incomplete(table, tmp_path, **keys) == [("nodule", "x"), ()]  # or an x is its label


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ("a.png,platelet, giant,2,3,9,9", [("*",), ()]),  # its image can be told
        ("x.png,platelet, giant,2,3,9,9", [("*",), ("*",)]),  # no other row is about this one
        (",nodule,2,3,9,9", [("*",), ("*",)]),
        ("a.png,,2,3,9,9", [("*",), ()]),
        ("a.png,heart,2,3,20,25", [(), ()]),  # a repetition
    ],
)
def test_a_row_that_cannot_be_read_may_be_about_any_label(tmp_path, row, lost):
    rows = f"a.png,heart,2,3,20,25\nb.png,heart,2,3,20,25\n{row}\n"
    write_rows(tmp_path, f"file,l,x1,y1,x2,y2\n{rows}")
    keys = {"table": "t.csv", "image": "file", "label": "l", "box": CORNERS}
    assert sum(reasons(read_all(table, tmp_path, **keys)[1]).values()) == 1
    assert incomplete(table, tmp_path, **keys) == lost


def test_codes_of_attributes_become_words(tmp_path):
    write_rows(tmp_path, "file,l,s,years\na.png,nodule,m,\nb.png,nodule,x,7\n")
    columns = {"s": "sex", "years": "age"}
    keys = {"table": "t.csv", "image": "file", "label": "l", "attribute_columns": columns}
    (sample,), drops = read_all(
        table, tmp_path, **keys, attribute_values={"sex": {"m": "male", "f": "female"}}
    )
    assert sample.attributes == {"sex": "male"}
    assert reasons(drops) == {"unknown value of an attribute": 1}
    with pytest.raises(ValidationError, match="no column gives: gender; there are age, sex"):
        options(table, tmp_path, **keys, attribute_values={"gender": {"m": "male"}})


def test_all_missing_columns_are_told_at_once(tmp_path):
    write_rows(tmp_path, "image_id,projection,sex\na,ap,m\n", images="a")
    keys = {"table": "t.csv", "image": "{id}.png", "label": "projetion", "group_column": "patient"}
    with pytest.raises(SourceError) as told:
        list(table.units(options(table, tmp_path, **keys)))
    assert str(told.value).endswith(
        "has no column 'id', 'projetion' (did you mean 'projection'?), 'patient'. "
        "There are 'image_id', 'projection', 'sex'."
    )


def test_columns_with_blanks_and_of_other_scripts_are_placeholders(tmp_path):
    write_image(tmp_path / "肝/007.PNG")
    (tmp_path / "t.csv").write_text(
        "image ID,部位,finding\n7,肝,cyst\nx,肝,cyst\n", encoding="utf-8"
    )
    keys = {"table": "t.csv", "label": "finding"}
    samples, drops = read_all(table, tmp_path, image="{部位}/{image ID:03d}.png", **keys)
    assert [sample.source_file for sample in samples] == ["肝/007.PNG"]
    assert reasons(drops) == {"no image name": 1}
    (tmp_path / "t.csv").write_text("file;finding\na.png;cyst\n")
    with pytest.raises(SourceError, match="say `delimiter: ';'`"):
        read_all(table, tmp_path, image="file", **keys)


def test_a_table_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * 2**20)
    monkeypatch.setattr(rows, "MAX_SHEETS", 2**19)
    monkeypatch.setattr(rows, "MAX_WIDE", 4)
    (tmp_path / "t.csv").write_text("file,y\na.png,x\n", encoding="utf-16")
    for name, keys in (("t.xlsx", {}), ("t.csv", {"encoding": "utf-16"})):
        with pytest.raises(SourceError, match="more than"):
            read_all(table, tmp_path, table=name, image="file", label="y", **keys)


def test_a_row_whose_cells_are_shifted_may_be_about_the_label_in_its_box(tmp_path):
    """A comma in the first cell, and one cell too few: the label stands where the box begins."""
    rows = "a.png,heart,2,3,20,25\na.png, giant,nodule,2,3,9\nb.png,nodule,2,3,20,25\n"
    write_rows(tmp_path, f"file,l,x1,y1,x2,y2\n{rows}")
    keys = {"table": "t.csv", "image": "file", "label": "l", "box": CORNERS}
    assert incomplete(table, tmp_path, **keys) == [("giant", "nodule"), ()]

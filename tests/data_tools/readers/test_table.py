# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.readers import rows, table
from data_tools.readers.rows import grouped, read_table
from data_tools.records import Sample
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, options, read_all, reasons, write_image

CORNERS = {"x1": "x1", "y1": "y1", "x2": "x2", "y2": "y2"}


def write_rows(root: Path, text: str, *, images: str = "ab", name: str = "t.csv") -> Path:
    for image in images:
        write_image(root / f"{image}.png")
    (root / name).write_text(text, encoding="utf-8")
    return root


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
    said = {"windows.csv": {"encoding": "cp1252"}, "wide.csv": {"encoding": "utf-16"}}
    said |= {"semicolon.csv": {"delimiter": ";"}, "t.xlsx": {"sheet": "labels"}}
    said |= {name: {} for name in ("t.csv", "bom.csv", "t.tsv", "t.jsonl")}
    for name, further in said.items():
        samples, drops = read_all(table, tmp_path, table=name, **keys, **further)
        assert drops == []
        expected = [[("µ", (1, 2, 3, 4))], [("n", (5, 6, 7, 8.5))]]
        assert [boxes(sample) for sample in samples] == expected, name
    with pytest.raises(SourceError, match=r"no sheet 'label'; there are 'notes', 'labels'"):
        read_all(table, tmp_path, table="t.xlsx", sheet="label", **keys)


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


MEMORY = """
import re, sys
from pathlib import Path
from data_tools.readers import table
options = table.Options(name="s", licence="x", reader="table", root=Path(sys.argv[1]), table="t.csv",
    image="file", label="label", box=dict(x1="x1", y1="y1", x2="x2", y2="y2"))
print(sum(len(unit.payload[1]) for unit in table.units(options)),
      int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
def test_scattered_rows_are_not_held_in_memory(tmp_path):
    with (tmp_path / "t.csv").open("w") as file:
        file.write("file,label,x1,y1,x2,y2\n")
        for number in range(200_000):
            file.write(f"images/train/case_{number % 100_000:08d}.png,nodule,1,2,30,40\n")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows, megabytes = map(int, result.stdout.split())
    assert rows == 200_000
    assert megabytes < 100  # 55 are Python and its packages


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


def test_a_table_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * 2**20)
    monkeypatch.setattr(rows, "MAX_SHEETS", 2**19)
    monkeypatch.setattr(rows, "MAX_WIDE", 4)
    (tmp_path / "t.csv").write_text("file,y\na.png,x\n", encoding="utf-16")
    for name, keys in (("t.xlsx", {}), ("t.csv", {"encoding": "utf-16"})):
        with pytest.raises(SourceError, match="more than"):
            read_all(table, tmp_path, table=name, image="file", label="y", **keys)


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("docProps/core.xml", None),
        ("xl/workbook.xml", b"<workbook><sheets/></workbook>"),
        ("xl/worksheets/sheet1.xml", b"<worksheet><sheetData><row><c r='A1'><v>f</v></c>"),
    ],
    ids=["a member that is cut", "no sheet", "rows that end in the middle"],
)
def test_a_damaged_excel_file_is_one_error_wherever_it_shows(tmp_path, member, content):
    book = openpyxl.Workbook()
    book.active.append(["file", "y"])
    book.save(tmp_path / "whole.xlsx")
    with (
        zipfile.ZipFile(tmp_path / "whole.xlsx") as whole,
        zipfile.ZipFile(tmp_path / "t.xlsx", "w") as damaged,
    ):
        for name in whole.namelist():
            damaged.writestr(name, whole.read(name) if name != member else content or b"")
    with pytest.raises(SourceError, match=r"t\.xlsx is no Excel file, or damaged"):
        list(read_table(tmp_path / "t.xlsx", ["file", "y"], source="s"))

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.readers import voc
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, incomplete, read_all, reasons, write_image

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>
<ymin>3</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object>"""


def write(root, name="a", *, objects=None, filename=None, size=(40, 30), whole=None):
    if objects is None:
        objects = OBJECT.format(name="cell", difficult=0, x1=2)
    text = f"""<annotation><filename>{filename or name + ".png"}</filename><size><width>{size[0]}
    </width><height>{size[1]}</height></size>{objects}</annotation>"""
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(whole or text)
    write_image(root / "JPEGImages" / f"{name}.png")


def test_corners_and_marks(tmp_path):
    write(tmp_path, objects=OBJECT.format(name="cell", difficult=1, x1=2))
    (edges,), _ = read_all(voc, tmp_path)
    (pixels,), _ = read_all(voc, tmp_path, corners="pixels")
    assert boxes(edges) == [("cell", (2, 3, 20, 25))]
    assert boxes(pixels) == [("cell", (1, 2, 20, 25))]
    assert edges.annotations[0].attributes == {"difficult": "yes"}
    (sample,), drops = read_all(voc, tmp_path, difficult=False)
    assert (sample.annotations, reasons(drops)) == ((), {"object marked difficult": 1})
    assert incomplete(voc, tmp_path) == [()]
    assert incomplete(voc, tmp_path, difficult=False) == [("cell",)]


def test_a_rectangle_that_cvat_turned(tmp_path):
    """18 x 22 around (11, 14), turned by 90 degrees: 22 x 18."""
    turn = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"
    plain = OBJECT.format(name="cell", difficult=0, x1=2)
    write(tmp_path, objects=plain.replace("</object>", turn.format(90.0) + "</object>"))
    (sample,), _ = read_all(voc, tmp_path)
    assert boxes(sample) == [("cell", pytest.approx((0, 5, 22, 23)))]
    write(tmp_path, objects=plain.replace("</object>", turn.format("") + "</object>"))
    assert reasons(read_all(voc, tmp_path)[1]) == {"box that can't be read": 1}


BOMB = """<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>"""
FILE = """<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><filename>&b;</filename>
</annotation>"""


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"whole": "<annotation><object>"}, "XML can't be read"),
        ({"whole": BOMB}, "XML that declares entities or a document type"),
        ({"whole": FILE}, "XML that declares entities or a document type"),
        ({"whole": "<html/>"}, "XML of another kind"),
        ({"whole": "<annotation/>"}, "XML without a needed element"),
        ({"filename": "../../a.png"}, "path outside the source"),
        ({"filename": "b.png"}, "no such image file"),
        ({"size": (41, 30)}, "image of another size than its annotation says"),
        ({"objects": "<object><name>a</name></object>"}, "box that can't be read"),
        ({"objects": OBJECT.format(name="a", difficult=0, x1="two")}, "box that can't be read"),
        ({"objects": OBJECT.format(name="a", difficult=0, x1="nan")}, "box that can't be read"),
        ({"objects": OBJECT.format(name=" ", difficult=0, x1=1)}, "no label"),
    ],
)
def test_bad_files_are_counted_and_the_others_read(tmp_path, keys, reason):
    write(tmp_path, "a", **keys)
    write(tmp_path, "z")
    samples, drops = read_all(voc, tmp_path)
    assert reasons(drops) == {reason: 1}
    assert boxes(samples[-1]) == [("cell", (2, 3, 20, 25))]


def test_a_picture_by_the_name_of_its_xml_file(tmp_path):
    write(tmp_path, "a", filename="of_another_disk.bmp")
    (sample,), drops = read_all(voc, tmp_path, image_by="stem")
    assert (sample.source_file, drops) == ("JPEGImages/a.png", [])


def test_a_list_that_names_a_missing_file(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a  1\nb -1\n../../c\n")
    samples, drops = read_all(voc, tmp_path, splits=("train",))
    assert len(samples) == 1
    assert reasons(drops) == {"no such annotation file": 1, "path outside the source": 1}
    with pytest.raises(SourceError, match=r"train.txt"):
        read_all(voc, tmp_path, splits=("trian",))

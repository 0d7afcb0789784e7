# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest

from data_tools import readers
from data_tools.readers import SourceOptions, arrays, slide, table, video
from data_tools.records import Annotation, Drop, Drops, Sample, Unit
from data_tools.standardise import UnitResult, duplicate_key, part_slug, read_unit, slug
from data_tools.taxonomy import load
from data_tools.worker import unit_fingerprint
from gmai_xtuner.core.archives import open_archives
from gmai_xtuner.core.imaging.bounded import DIED
from tests.core.test_archives import pack
from tests.data_tools.readers.sets import options, write_image

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)


class Options(SourceOptions):
    reader: Literal["given"] = "given"


@pytest.fixture
def read(tmp_path: Path, monkeypatch):
    """Reads samples that are given, of the file ``a/b.png``, as a source with these options."""

    def read(*samples: Sample, lost: Sequence[str] = (), **options: Any) -> UnitResult:
        def given(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
            if lost:
                drops.add("odd", "x", lost=lost)
            yield from samples

        module = ModuleType("given")
        module.read = given  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "given", module)
        monkeypatch.setitem(readers.READERS, "given", "given")
        (tmp_path / "root" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "a" / "b.png").write_bytes(b"source")
        values = {"licence": "MIT", "modality": "CT", "department": "None"}
        values |= {"anonymous_names": False} | options
        source = Options(name="set", root=tmp_path / "root", **values)
        return read_unit(source, Unit("u"), folder=tmp_path / "out", taxonomy=load())

    return read


def sample(*annotations: Annotation, **values: Any) -> Sample:
    return Sample(**{"image": NOISE, "source_file": "a/b.png", "annotations": annotations} | values)


def reasons(result: UnitResult) -> list[tuple[str, str]]:
    return [(drop.stage, drop.reason) for drop in result.drops]


CAT = Annotation("cat")


def test_a_record_has_everything_that_is_known(read):
    box = Annotation("1", (10, 20, 30, 40), attributes={"side": "left"})
    given = sample(
        CAT,
        box,
        part={"axis": "z", "slice": 40},
        group="p7",
        attributes={"view": "PA", "sex": "f"},
        preprocessing={"window": "W 400 L 40"},
    )
    result = read(
        given,
        labels={"1": "nodule", "cat": "cat"},
        dataset="The Set",
        url="https://example.org",
        attributes={"view": "AP"},
        source_task="2D detection",
        clinical_task="Disease Diagnosis",
    )
    assert result.drops == ()
    assert (result.samples, result.files) == (1, ("a/b.png",))
    (record,) = result.records
    assert record.id == "2d#det#ct#set#a#b.png#z_0040"
    assert (record.width, record.height) == (80, 60)
    assert [(x.name, x.box, dict(x.attributes)) for x in record.labels] == [
        ("cat", None, {}),
        ("nodule", (10, 20, 30, 40), {"side": "left"}),
    ]
    assert record.attributes == {"view": "AP", "sex": "f"}
    origin = record.provenance
    assert origin.group == "set/p7"
    assert origin.part == {"axis": "z", "slice": 40}
    assert (origin.dataset, origin.url) == ("The Set", "https://example.org")
    assert origin.preprocessing == {"window": "W 400 L 40"}
    # sha256 of b"source"
    assert origin.sha256.startswith(
        "41cf6794ba4200b839c53531555f0f3998df4cbb01a4d5cb0b94e3ca5e23947d"
    )


def test_the_jobs_modality_goes_before_the_files(read):
    for modality, found in (("CT", "CT"), (None, "MR")):
        (record,) = read(sample(CAT, modality="MR"), modality=modality).records
        assert record.modality == found


@pytest.mark.parametrize(
    ("given", "options", "stage", "reason"),
    [
        (sample(), {}, "record", "no label"),
        (sample(Annotation(" ")), {}, "record", "no label"),
        (sample(Annotation("cat \ud800")), {}, "record", "label that no UTF-8 can hold"),
        (sample(CAT, attributes={"view": "\ud800"}), {}, "record", "text that no UTF-8 can hold"),
        (sample(CAT, group="\ud800"), {}, "record", "text that no UTF-8 can hold"),
        (sample(CAT), {"labels": {"dog": "dog"}}, "record", "unknown label"),
        (sample(CAT), {"labels": {"cat": None}}, "record", "unclear label"),
        (sample(CAT), {"modality": None}, "record", "no modality"),
        (sample(CAT, modality="QQ"), {"modality": None}, "record", "unknown modality"),
        (sample(CAT, source_file="a/none.png"), {}, "record", "source file can't be read"),
        (sample(CAT, source_file="a/\udcff.png"), {}, "record", "file name is not valid Unicode"),
        (sample(CAT, image=Path("/none.png")), {}, "record", "image can't be read"),
        (sample(CAT), {"group": "zz"}, "record", "path without the job's `group`"),
        (sample(CAT, image=NOISE * 0), {}, "record", "picture of one grey level"),
    ],
)
def test_what_is_left_out_has_a_reason(read, given, options, stage, reason):
    result = read(given, **options)
    assert result.records == ()
    assert reasons(result) == [(stage, reason)]


def test_labels_that_the_job_does_not_name_are_left_out_and_listed_at_once(read):
    others = [Annotation(f"{number}", (1, 1, 9, 9)) for number in range(2, 42)]
    result = read(sample(CAT, *others), labels={"cat": "cat"})
    (record,) = result.records
    assert record.names == ("cat",)
    assert record.incomplete == tuple(sorted(str(number) for number in range(2, 42)))
    (drop,) = result.drops
    assert (drop.reason, "'41'" in drop.detail) == ("unknown label", True)


def test_a_record_of_which_the_rules_leave_nothing_is_dropped_with_both_reasons(read):
    mask = np.zeros((60, 80), dtype=bool)
    mask[5, 5] = True
    result = read(sample(Annotation("cat", mask=mask)))
    assert [stage for stage, _ in reasons(result)] == ["clean", "record"]
    assert result.drops[-1] == Drop("record", "no label left by the rules", "a/b.png")


def test_boxes_of_a_picture_rotated_by_exif_are_not_guessed(read, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "turned.png", exif=exif)
    boxed = read(sample(Annotation("cat", (1, 2, 30, 40)), image=tmp_path / "turned.png"))
    assert reasons(boxed) == [("record", "picture with regions is rotated by EXIF")]
    whole = read(sample(CAT, image=tmp_path / "turned.png"))
    assert (whole.records[0].width, whole.records[0].height) == (60, 80)


def test_twins_are_records_of_the_same_pixels_and_labels(read):
    box = Annotation("cat", (10, 20, 30, 40))
    result = read(
        sample(CAT),
        sample(CAT, part={"frame": 2}, image=np.stack([NOISE] * 3, axis=-1)[:, :, 0].copy()),
        sample(CAT, box),
        sample(box, CAT),
        sample(Annotation("dog")),
        sample(CAT, image=255 - NOISE),
        sample(CAT, attributes={"side": "left"}),
    )
    names = [duplicate_key(record) for record in result.records]
    assert [names.index(name) for name in names] == [0, 0, 2, 2, 4, 5, 6]


def test_slugs():
    assert slug("Fundus Photography (colour)") == "fundus_photography_colour"
    parts = [{"axis": "z", "slice": 40}, {"frame": 12}, {}]
    assert [part_slug(part) for part in parts] == ["z_0040", "0012", ""]


@pytest.mark.parametrize(
    ("annotations", "part", "default", "task", "prefix"),
    [
        ([CAT], {}, "2D classification", "2D classification", "2d#cls"),
        ([CAT, Annotation("a", (1, 2, 30, 40))], {}, "2D classification", "2D detection", "2d#det"),
        ([Annotation("a", mask=NOISE > 9)], {}, "2D classification", "2D segmentation", "2d#seg"),
        ([Annotation("a", mask=NOISE > 9)], {"axis": "z", "slice": 3}, "2D classification",
         "3D segmentation", "3d#seg"),
        ([CAT], {"axis": "z", "slice": 3}, "3D segmentation", "2D classification", "2d#cls"),
        ([Annotation("a", (1, 2, 30, 40))], {}, "2D segmentation", "2D segmentation", "2d#seg"),
    ],
)  # fmt: skip
def test_the_task_is_that_of_what_the_picture_has(
    read, monkeypatch, annotations, part, default, task, prefix
):
    """A table or a DICOM folder may hold classes, boxes or masks."""
    monkeypatch.setattr(SourceOptions, "default_source_task", default)
    (found,) = read(sample(*annotations, part=part)).records
    assert found.source_task == task
    assert found.id.startswith(f"{prefix}#ct#set#")
    (named,) = read(sample(*annotations, part=part), source_task="2D detection").records
    assert named.source_task == "2D detection"


def test_labels_of_what_was_left_out_have_the_names_of_the_corpus(read):
    speck = NOISE < 0
    speck[0, 0] = True
    given = sample(Annotation("1", (1, 2, 30, 40)), Annotation("2", mask=speck))
    lost = ("3", "unknown", " 1 ")
    (found,) = read(given, lost=lost, labels={"1": "cat", "2": "dog", "3": "owl"}).records
    assert found.incomplete == ("cat", "dog", "owl", "unknown")
    assert found.names == ("cat",)


@pytest.mark.parametrize(
    ("labels", "options", "reason"),
    [
        (["no finding", "edema"], {}, "labels that contradict each other"),
        (["benign", "malignant"], {"exclusive": [["benign", "malignant"]]},
         "labels that contradict each other"),
        (["benign", "malignant"], {}, None),
        (["no finding"], {"lost": ["*"]}, "no finding in an image of which something was left out"),
        (["no finding"], {"lost": ["edema"]}, "labels that contradict each other"),
        (["no finding"], {}, None),
    ],
)  # fmt: skip
def test_contradictions_inside_a_set_are_dropped_and_counted(read, labels, options, reason):
    result = read(sample(*map(Annotation, labels)), **options)
    counted = [drop.reason for drop in result.drops if drop.stage == "record"]
    assert (len(result.records), counted) == ((0, [reason]) if reason else (1, []))


def test_no_finding_beside_boxes_is_a_contradiction(read):
    box = Annotation("red blood cell", (10, 20, 30, 40))
    assert not read(sample(Annotation("No finding"), box)).records
    (found,) = read(sample(box, examined=("red blood cell", "*"))).records
    assert found.examined == ("*", "red blood cell")


def test_codes_of_one_label_are_one_region_but_objects_stay(read, monkeypatch):
    whole = np.zeros((60, 80), dtype=bool)
    whole[10:50, 10:60] = True
    core = np.zeros_like(whole)
    core[20:30, 20:40] = True
    given = sample(Annotation("1", mask=whole & ~core), Annotation("2", mask=core))
    labels = {"1": "tumour", "2": "tumour"}
    (record,) = read(given, labels=labels).records
    assert [(label.box, label.area) for label in record.labels] == [((10, 10, 60, 50), 2000)]
    monkeypatch.setattr(Options, "masks_are_objects", True)
    (record,) = read(given, labels=labels).records
    assert len(record.labels) == 2


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Annotation("No finding", (1, 1, 20, 20)), "box that is said to show nothing"),
        (Annotation("No finding", (0, 0, 1, 1)), "box that is said to show nothing"),
        (Annotation("Normal", (1, 1, 20, 20)), "box that is said to show nothing"),
        (Annotation("negative for tumor", (1, 1, 20, 20)), "box that is said to show nothing"),
        (Annotation("正常", (1, 1, 20, 20)), "box that is said to show nothing"),
        (Annotation("left breast"), "labels that contradict each other"),
        (Annotation("kidney_left", (1, 1, 20, 20)), "labels that contradict each other"),
    ],
)
def test_a_statement_that_contradicts_itself_or_the_side_is_dropped(read, annotation, reason):
    given = sample(annotation, Annotation("right breast"), attributes={"side": "right"})
    assert reasons(read(given)) == [("record", reason)]


def test_no_and_yes_are_classes_with_boxes(read):
    (record,) = read(
        sample(Annotation("no", (1, 1, 20, 20)), Annotation("yes", (5, 5, 9, 9)))
    ).records
    assert [label.name for label in record.labels] == ["no", "yes"]


ABORT = "import os; os.abort()"


@pytest.mark.parametrize(
    ("reader", "library", "file", "keys", "code", "reason"),
    [
        (arrays, "h5py", "a/b.h5", {"images": "{label}/{case}.h5"}, ABORT, DIED),
        (arrays, "tifffile", "a/b.tif", {"images": "{label}/{case}.tif"}, "bytearray(2**36)", "MemoryError"),
        (slide, "openslide", "a/b.svs", {}, ABORT, DIED),
        (video, "av", "a/b.mp4", {}, ABORT, DIED),
    ],
)  # fmt: skip
def test_a_library_that_dies_or_allocates_costs_one_file(
    tmp_path, planted, reader, library, file, keys, code, reason
):
    planted(library, code)
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / file).write_bytes(b"odd")
    chosen = options(reader, tmp_path / "root", modality="CT", **keys)
    (unit,) = reader.units(chosen)
    result = read_unit(chosen, unit, folder=tmp_path / "out", taxonomy=load())
    (drop,) = result.drops
    assert (result.records, drop.where) == ((), file)
    assert reason in f"{drop.reason}: {drop.detail}"


def test_what_a_process_of_its_own_leaves_out_is_told(tmp_path):
    pixels = np.stack([NOISE, NOISE // 2, NOISE // 3])
    masks = np.zeros_like(pixels)
    masks[0, 9:30, 9:30] = masks[2, 5:40, 5:40] = 1
    (tmp_path / "root").mkdir()
    np.savez(tmp_path / "root" / "a.npz", imgs=pixels, gts=masks)
    keys = {"images": "{case}.npz", "image_key": "imgs", "mask_key": "gts"}
    chosen = options(arrays, tmp_path / "root", modality="CT", labels={"1": "liver"}, **keys)
    (unit,) = arrays.units(chosen)
    result = read_unit(chosen, unit, folder=tmp_path / "out", taxonomy=load())
    assert [record.provenance.part["index"] for record in result.records] == [0, 2]
    assert reasons(result) == [("record", "no label")]
    assert result.samples == 3


def test_an_image_may_lie_in_an_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_CACHE", str(tmp_path / "cache"))
    content = write_image(tmp_path / "a.png").read_bytes()
    keys = {"table": "t.csv", "image": "f", "label": "l", "department": "None"}
    chosen = options(table, tmp_path / "root", modality="CT", anonymous_names=False, **keys)
    chosen.root.mkdir()
    (chosen.root / "t.csv").write_text("f,l\nscans.zip/ct/1.png,cat\nscans.zip/ct/2.png,cat\n")
    pack(chosen.root / "scans.zip", [("ct/1.png", content)])
    (unit,) = table.units(chosen)
    found = read_unit(chosen, unit, folder=tmp_path / "out", taxonomy=load())
    (record,) = found.records
    assert (record.width, record.height) == (40, 30)
    assert record.provenance.file == "scans.zip/ct/1.png"
    assert record.provenance.sha256 == hashlib.sha256(content).hexdigest()
    assert [drop.reason for drop in found.drops] == ["no such image file"]

    before = unit_fingerprint(chosen.root, unit, found.files)
    assert unit_fingerprint(chosen.root, unit, found.files) == before
    pack(chosen.root / "scans.zip", [("ct/1.png", content), ("ct/2.png", content)])
    open_archives(chosen.root / "scans.zip")  # as a new run does
    assert unit_fingerprint(chosen.root, unit, found.files) != before

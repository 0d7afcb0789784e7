# SPDX-License-Identifier: Apache-2.0

"""No name, number, date or UID of a patient is in any file that a run leaves, its own state included."""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from data_tools import generate as command
from data_tools import readers
from tests import medical_files
from tests.data_tools.conftest import generate
from tests.data_tools.readers.test_dicom import dataset, save

# Each planted in another place; upper and lower case are one.
NAME, NUMBER, BIRTH, STUDY = "Zwetschgenbaum^Ottilie", "PID-83562917", "19430217", "20190823"
INSTITUTION, PHYSICIAN, ACCESSION = "Kreisspital Hinterwald", "Dr^Quendolin", "ACC83625"
PRIVATE, COMMENT, UID = "Geheimtag77", "Nachbarin von Xaver", "1.2.826.0.1.3680043.9.7777"
CORNERS = ("x1", "y1", "x2", "y2")
SECRETS = (
    "zwetschgenbaum", "ottilie", "83562917", BIRTH, STUDY, "hinterwald", "quendolin", "acc83625",
    "geheimtag77", "xaver", "3680043.9.7777", "1943-02-17", "2019-08-23",
)  # fmt: skip


def write(root: Path) -> None:
    generator = np.random.default_rng(5)
    for index in range(4):
        data = dataset(
            generator.integers(0, 1500, (24, 24)),
            PatientName=NAME, PatientID=NUMBER, PatientBirthDate=BIRTH, StudyDate=STUDY, SeriesDate=STUDY,
            AcquisitionDate=STUDY, ContentDate=STUDY, InstitutionName=INSTITUTION, AccessionNumber=ACCESSION,
            ReferringPhysicianName=PHYSICIAN, PatientComments=COMMENT, ImageComments=COMMENT,
            StudyDescription=f"Verlauf {NAME}", SeriesDescription=NAME, ProtocolName=NAME,
            StudyInstanceUID=f"{UID}.1", SeriesInstanceUID=f"{UID}.2", SOPInstanceUID=f"{UID}.3.{index}",
            FrameOfReferenceUID=f"{UID}.4", ViewPosition=f"AP {NAME}", Laterality=NAME,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 2.0 * index],
            PixelSpacing=[1, 1], InstanceNumber=index,
        )  # fmt: skip
        other = Dataset()
        other.PatientID, other.PatientName = NUMBER, NAME
        data.OtherPatientIDsSequence = Sequence([other])
        block = data.private_block(0x0029, "HERSTELLER", create=True)
        block.add_new(0x01, "LO", PRIVATE)
        block.add_new(0x02, "PN", NAME)
        save(root / NAME / f"{STUDY}_{NUMBER}" / f"{NAME}_{index}.dcm", data)
    # Files that are no good are named in dropped.jsonl, and must not be named there.
    (root / NAME / f"Brief an {NAME}.dcm").write_bytes(b"not DICOM")
    cut = root / NAME / f"{NUMBER}.dcm"
    data = dataset(
        generator.integers(0, 9, (24, 24)), PatientName=NAME, PatientID=NUMBER, StudyInstanceUID=f"{UID}.1",
        SeriesInstanceUID=f"{UID}.9",
    )  # fmt: skip
    data.PixelData = data.PixelData[:100]
    save(cut, data)


@pytest.mark.parametrize("volumes", [True, False])
def test_nobody_is_in_any_file(make_job, tmp_path, volumes):
    root = tmp_path / "dicom"
    write(root)
    table = "key,finding,x1,y1,x2,y2\n" + f"{NUMBER},pneumonia,,,,\n{NUMBER},nodule,a,b,c,d\n"
    (tmp_path / "labels.csv").write_text(table)
    source = {
        "name": "scans", "reader": "dicom", "root": str(root), "modality": "CT", "table": "labels.csv",
        "match": "PatientID", "volumes": volumes, "department": "Pulmonary Medicine", "anonymous_names": True,
        "columns": {"file": "key", "label": "finding", "box": dict(zip(CORNERS, CORNERS, strict=True))},
    }  # fmt: skip
    made = generate(make_job(source, make={"caption": 2, "text_multi": 1, "perception": 3}))
    assert made.returncode == 0, made.stderr
    out = tmp_path / "out"
    records = (out / "records.jsonl").read_text().splitlines()
    assert len(records) >= 4
    assert {json.loads(line)["provenance"]["group"] for line in records} == {
        json.loads(records[0])["provenance"]["group"]
    }
    dropped = (out / "dropped.jsonl").read_text()
    assert "not a DICOM file" in dropped
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.name == "state.sqlite" for path in files)
    for path in files:
        told = path.relative_to(out).as_posix().lower().encode() + path.read_bytes().lower()
        found = [secret for secret in SECRETS if secret.encode() in told]
        assert not found, (path.relative_to(out), found)
    said = (made.stdout + made.stderr).lower()
    assert not [secret for secret in SECRETS if secret in said]


def told_by(folder: Path) -> bytes:
    """Everything that a folder holds, unpacked, and the names of its files."""
    found = []
    for path in filter(Path.is_file, folder.rglob("*")):
        found += [str(path.relative_to(folder)).encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            found.append(repr(pyarrow.parquet.read_table(path).to_pylist()).encode())
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                found.append(repr(image.info).encode())
            data = path.read_bytes()
            parts, at = b"", 8
            while at < len(data):
                length = int.from_bytes(data[at : at + 4], "big")
                parts += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
                at += 12 + length
            found.append(zlib.decompressobj().decompress(parts))
    return b"\n".join(found)


class Planter:
    """Random tokens, each of which stands for somebody's identity, and the place that it was put in."""

    def __init__(self, seed: int) -> None:
        self.rng, self.places = np.random.default_rng(seed), dict[str, str]()

    def __call__(self, place: str) -> str:
        letters = self.rng.choice(list("BCDFGHKLMNPRSTVWXZ"), 7)
        token = f"{''.join(letters).title()}{self.rng.integers(10, 99)}"
        self.places[token] = place
        return token

    def pixels(self) -> np.ndarray:
        return self.rng.integers(0, 255, (40, 40), dtype=np.uint8)

    def found_in(self, told: bytes) -> list[str]:
        return [
            place for token, place in self.places.items() if token.lower().encode() in told.lower()
        ]


def png(plant: Planter, **info: Any) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", plant("PNG tEXt"))
    text.add_text("Comment", plant("PNG zTXt"), zip=True)
    text.add_itxt("Author", plant("PNG iTXt"))
    exif = Image.Exif()
    exif[0x010E] = plant("PNG eXIf")
    data = io.BytesIO()
    icc = plant("PNG ICC profile").encode() * 20
    Image.fromarray(plant.pixels()).save(data, "PNG", pnginfo=text, exif=exif, icc_profile=icc)
    whole = data.getvalue()
    body = b"IDAT" + plant("PNG IDAT after the pixels").encode()
    more = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return whole[:-12] + more + whole[-12:] + plant("behind a PNG").encode()


def jpeg(plant: Planter) -> bytes:
    exif = Image.Exif()
    exif[0x010E], exif[0x9286] = plant("EXIF description"), plant("EXIF comment")
    first, second = io.BytesIO(), io.BytesIO()
    image, icc = Image.fromarray(plant.pixels()), plant("JPEG ICC profile").encode() * 20
    image.save(second, "JPEG", comment=plant("comment of an appended JPEG"))
    image.save(first, "JPEG", exif=exif, comment=plant("JPEG comment"), icc_profile=icc)
    return first.getvalue() + second.getvalue()


def tiff(plant: Planter) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (270, 315, 305, 316, 33432, 269, 285):
        tags[tag] = plant(f"TIFF tag {tag}")
    data = io.BytesIO()
    Image.fromarray(plant.pixels()).save(data, "TIFF", tiffinfo=tags)
    return data.getvalue()


def volume(plant: Planter, path: Path) -> None:
    cube = plant.rng.integers(0, 900, (24, 24, 6)).astype(np.int16)
    header = nibabel.Nifti1Header()
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        header[field] = plant(f"NIfTI {field}").encode()
    image = nibabel.Nifti1Image(cube, np.diag([1.0, 1, 1, 1]), header)
    for code in (4, 6):
        note = plant(f"NIfTI extension {code}").encode()
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, note))
    nibabel.save(image, path)


def write_everything(plant: Planter, root: Path) -> list[dict[str, Any]]:
    """Sets in which every place that a format has for text names somebody; the sources of a job."""
    folders, case = root / "classes", plant("folder of a case")
    base = {"licence": "internal use", "department": "None", "modality": "CT", "clean": "none"}
    for name, made in {"png": png, "jpg": jpeg, "tif": tiff}.items():
        place = folders / "nodule" / plant("folder")
        place.mkdir(parents=True)
        whole = made(plant)
        (place / f"{plant('file name')}.{name}").write_bytes(whole)
        (place / f"{plant('name of a damaged file')} {plant('second word')}.{name}").write_bytes(
            whole[:300]
        )
    (folders / "nodule" / f"{plant('name of an empty file')}.png").write_bytes(b"")
    cases = root / "cases" / case
    cases.mkdir(parents=True)
    volume(plant, cases / "ct.nii.gz")
    labels = np.zeros((24, 24, 6), np.uint8)
    labels[5:15, 5:15, 2:4] = 1
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), cases / "seg.nii.gz")
    broken = root / "cases" / plant("folder of a broken volume")
    broken.mkdir()
    for name in ("ct.nii.gz", "seg.nii.gz"):
        (broken / name).write_bytes(plant("broken NIfTI").encode() * 40)
    arrays = root / "arrays"
    arrays.mkdir()
    packed = arrays / f"{plant('NPZ')}.npz"
    np.savez(
        packed, images=plant.rng.integers(0, 255, (3, 30, 30)), labels=[0, 1, 1], who=plant("array")
    )
    with zipfile.ZipFile(packed, "a") as archive:
        archive.comment = plant("ZIP comment").encode()
        archive.writestr(plant("ZIP member"), plant("content of a ZIP member"))
    rows = root / "rows"
    rows.mkdir()
    lines = ["file,finding,x,y,w,h,patient"]
    for index in range(3):
        name = f"{plant('file of a table')}.png"
        Image.fromarray(plant.pixels()).save(rows / name)
        lines.append(f"{name},nodule,1,1,{20 + index},20,{plant('patient of a table')}")
    lines.append(f"{plant('missing file')}.png,nodule,1,1,5,5,{plant('patient without a file')}")
    lines.append(f"{name},nodule,{plant('number of a table')},1,5,5,{plant('patient')}")
    (rows / "t.csv").write_text("\n".join(lines))
    box = {"x1": "x", "y1": "y", "width": "w", "height": "h"}
    return [
        base | {"name": "classes", "reader": "image_folder", "root": str(folders)},
        base | {"name": "volumes", "reader": "volume", "root": str(root / "cases"), "labels": {"1": "nodule"},
                "images": "{case}/ct.nii.gz", "masks": "{case}/seg.nii.gz"},
        base | {"name": "arrays", "reader": "arrays", "root": str(arrays), "images": "{set}.npz",
                "image_key": "images", "label_key": "labels", "labels": {"0": "cyst", "1": "nodule"}},
        base | {"name": "rows", "reader": "table", "root": str(rows), "table": "t.csv", "image": "file",
                "label": "finding", "box": box, "group_column": "patient"},
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_planted_identities_are_nowhere(make_job, tmp_path, capfd, caplog, seed):
    plant = Planter(seed)
    sources = write_everything(plant, tmp_path / "data")
    job = make_job(*(source | {"anonymous_names": True} for source in sources), make={"caption": 2})
    assert command.main([str(job)]) == 0
    assert command.main([str(job), "--dry-run"]) == 0
    assert command.main([str(job)]) == 0  # all is known
    said = capfd.readouterr()
    told = told_by(tmp_path / "out") + (said.out + said.err + caplog.text).encode()
    assert not plant.found_in(told)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["records"]["count"] >= 3 + 3 + 3 + 2
    assert command.main([str(job), "--names"]) == 0
    names = dict(line.split("\t")[1:] for line in capfd.readouterr().out.splitlines())
    with (tmp_path / "out" / "records.jsonl").open() as lines:
        files = {json.loads(line)["provenance"]["file"] for line in lines}
    assert files <= names.keys()
    assert all(list((tmp_path / "data").rglob(Path(names[name]).name)) for name in files)
    assert "image is truncated" in (tmp_path / "out" / "dropped.jsonl").read_text()


def dictionary_vr(tag: int) -> str:
    """The value representation; LO for attributes younger than the dictionary."""
    try:
        return dictionary_VR(tag)[:2]
    except KeyError:
        return "LO"


PROFILE = Path(readers.__file__).with_name("dicom_profile.tsv")
PLANTED: dict[str, Callable[[int], Any]] = {
    "DA": lambda n: f"{1900 + n // 28 // 12}{n // 28 % 12 + 1:02}{n % 28 + 1:02}",
    "TM": lambda n: f"07{n // 60 % 60:02}{n % 60:02}.7319{n:02}",
    "DT": lambda n: f"1931{n % 12 + 1:02}{n % 28 + 1:02}0719{n % 60:02}.{n:06}",
    "UI": lambda n: f"1.2.826.0.1.3680043.9.8642.{n}",
    "SQ": lambda n: [medical_files.item(PatientComments=f"Qxjzk{n:03}q", PatientName=f"Wqxvk{n:03}q")],
    "FD": lambda n: 8675309.0 + n, "FL": lambda n: 8675309.0 + n, "DS": lambda n: str(8675309 + n),
    "IS": lambda n: str(8675309 + n), "US": lambda n: 60000 + n, "UL": lambda n: 8675309 + n,
    "SS": lambda n: 20000 + n, "SL": lambda n: 8675309 + n, "AS": lambda n: f"{n:03}Y",
    "OB": lambda n: f"Qxjzk{n:03}q".encode(), "OW": lambda n: f"Qxjzk{n:03}q".encode(),
    "UN": lambda n: f"Qxjzk{n:03}q".encode(),
}  # fmt: skip


def test_no_attribute_of_the_profile_leaves(make_job, tmp_path, capfd, caplog):
    """Row by row of PS3.15 table E.1-1: nothing of the attribute is in the corpus, its state or its texts."""
    lines = [line for line in PROFILE.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines, delimiter="\t"))
    assert len(rows) == 656
    assert {row["action"] for row in rows} == {
        "X", "Z", "D", "U", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*"
    }  # fmt: skip
    pixels = np.random.default_rng(5).integers(0, 1500, (24, 24))
    data, planted = medical_files.dicom(pixels.astype(np.int16)), {}
    private = data.private_block(0x0029, "HERSTELLER", create=True)
    for number, row in enumerate(rows, start=100):
        token = f"Qxjzk{number:03}q"
        if row["tag"] == "ODD GROUP":
            private.add_new(0x01, "LO", token)
        elif not row["tag"].startswith("0000"):  # a file has no elements of commands
            tag = int(row["tag"].replace("XXXXXX", "020010").replace("XX", "02"), 16)
            vr = dictionary_vr(tag)
            value = PLANTED.get(vr, lambda n: f"Qxjzk{n:03}q")(number)
            (data.file_meta if tag >> 16 == 2 else data).add_new(tag, vr, value)
            token = f"{number:03}q" if vr == "SQ" else str(value)
            token = f"Qxjzk{number:03}q" if vr in ("OB", "OW", "UN") else token
        planted[row["tag"]] = token
    data.PatientSex, planted["00100040"] = "F", "female"
    save(tmp_path / "dicom" / "a.dcm", data)
    (tmp_path / "labels.csv").write_text("key,finding\na.dcm,nodule\n")
    source = {
        "name": "scans", "reader": "dicom", "root": str(tmp_path / "dicom"), "table": "labels.csv",
        "department": "None", "columns": {"file": "key", "label": "finding"}, "anonymous_names": True,
    }  # fmt: skip
    assert command.main([str(make_job(source))]) == 0
    said = capfd.readouterr()
    told = told_by(tmp_path / "out") + (said.out + said.err).encode()
    short = {"AS", "US", "SS"}  # three to five digits are in any file of numbers
    leaks = [
        (row["tag"], row["attribute"]) for row in rows
        if planted[row["tag"]].encode() in told
        and not (row["tag"].isalnum() and dictionary_vr(int(row["tag"].replace("X", "0"), 16)) in short)
    ]  # fmt: skip
    assert not leaks

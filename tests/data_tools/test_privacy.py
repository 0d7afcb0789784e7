# SPDX-License-Identifier: Apache-2.0

"""No name, number, date or UID of a patient is in any file that a run leaves, its own state included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

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
        "match": "PatientID", "volumes": volumes, "department": "Pulmonary Medicine",
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

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data_tools.import_gmai import main
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.core.records import iter_raw
from tests.core.test_archives import png

OPEN, CLOSED = "GMAI-VL-5.5M-OpenSource", "GMAI-VL-5.5M-NonOpenSource"
PHYSIONET = "PhysioNet Credentialed Health Data Use Agreement"
CAPTIONS = "GMAI-MM-Caption-1.7M.jsonl"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_CACHE", str(tmp_path / "cache"))


def record(number: int, source: str = "crc100k") -> dict[str, Any]:
    path = f"2d/cls/pathology/{source}/images/{number % 7}/{number:05}.png"
    turns = [("human", "<image>\nWhat is it?"), ("gpt", f"Number {number}.")]
    return {
        "id": path.replace("/", "#"),
        "image": f"images/{path}",
        "conversations": [{"from": one, "value": text} for one, text in turns],
    }


def line(one: dict[str, Any]) -> bytes:
    return json.dumps(one).encode()


def content(number: int) -> bytes:
    return png(number % 256, side=2 + number // 256)


class Mirror:
    def __init__(self, folder: Path, num_open: int, num_closed: int) -> None:
        self.folder, self.copy = folder / "GMAI-VL-5.5M", folder / "mimic"
        self.open = [record(number) for number in range(num_open)]
        self.closed = [record(10_000 + number, "MIMIC-CXR") for number in range(num_closed)]
        self.lines = {OPEN: [*map(line, self.open)], CLOSED: [*map(line, self.closed)]}
        self.members = [[], []]
        for number, one in enumerate(self.open):
            name = one["image"].removeprefix("images/")
            self.members[number % 2].append((name, content(number)))
        self.files = {
            one["image"].split("/", 5)[5]: 10_000 + n for n, one in enumerate(self.closed)
        }

    def write(self) -> Path:
        for part, lines in self.lines.items():
            (self.folder / part / "annotations").mkdir(parents=True)
            (self.folder / part / "annotations" / CAPTIONS).write_bytes(b"\n".join(lines))
        (self.folder / OPEN / "zips").mkdir()
        for number, members in enumerate(self.members, 1):
            path = self.folder / OPEN / "zips" / f"images_chunk_{number:03}.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in members:
                    archive.writestr(name, data)
        text = json.dumps({**record(0), "image": None, "id": 1}).replace("<image>\\n", "")
        (self.folder / OPEN / "annotations" / "GMAI_Text_Single_1M.jsonl").write_text(text)
        for name, number in self.files.items():
            path = self.copy / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(number))
        return self.folder

    def run(self, *options: str) -> int:
        return main([str(self.folder), "--images", f"MIMIC-CXR={self.copy}", *options])

    def faults(self) -> list[dict[str, Any]]:
        text = (self.folder / "imported" / "faults.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def linked(self) -> dict[int, tuple[int, int]]:
        found = {}
        for entry in load_mixture(self.folder / "imported" / "mixture.yaml").entries:
            for path in entry.annotations:
                for raw in iter_raw(path):
                    with suppress(GMAIError):
                        for image in parse_raw(raw, dataset=entry.name).images:
                            shown = open_rgb(entry.image_root / image)
                            found[int(Path(image).stem)] = (
                                shown.getpixel((0, 0))[0],
                                shown.size[0],
                            )
        return found


def test_every_planted_fault_is_found_and_nothing_is_linked_wrongly(tmp_path, capsys):
    mirror = Mirror(tmp_path, 1000, 1000)
    numbers = iter(random.Random(3).sample(range(1000), 60))
    planted: list[tuple[str, int]] = []

    def plant(reason: str, more: int = 0) -> int:
        number = next(numbers)
        planted.append((reason, number + more))
        return number

    for _ in range(4):
        gone = plant("missing_image")
        mirror.members[gone % 2] = [
            x for x in mirror.members[gone % 2] if f"/{gone:05}" not in x[0]
        ]
        lost = plant("missing_image", 10_000)
        del mirror.files[mirror.closed[lost]["image"].split("/", 5)[5]]
        number = plant("wrong_id")
        other = {**mirror.open[number], "id": mirror.open[(number + 7) % 1000]["id"]}
        mirror.lines[OPEN][number] = line(other)
        number = plant("missing_image", 99_000)
        wrong = json.dumps(mirror.closed[number]).replace(
            f"{10_000 + number}", f"{99_000 + number}"
        )
        mirror.lines[CLOSED][number] = wrong.encode()
        number = plant("ambiguous_image")  # the same member in the other archive
        name = mirror.open[number]["image"].removeprefix("images/")
        mirror.members[1 - number % 2].append((name, content(77)))
    number = plant("ambiguous_image")  # twice in one
    planted.append(("duplicate_member", number))
    again = mirror.open[number]["image"].removeprefix("images/")
    mirror.members[number % 2].append((again, content(number)))
    number = plant("ambiguous_image", 10_000)  # a second file that ends alike in the user's copy
    mirror.files[f"old/{mirror.closed[number]['image'].split('/', 5)[5]}"] = 5
    number = plant("not_json")
    mirror.lines[CLOSED][number] = mirror.lines[CLOSED][number][:-20]
    number = plant("not_utf8")
    mirror.lines[OPEN][number] = mirror.lines[OPEN][number].replace(b"What", b"\xff")
    with pytest.warns(UserWarning, match="Duplicate"):
        mirror.write()

    assert mirror.run() == 3
    assert json.loads(capsys.readouterr().out)["mixture"] is None
    found = []
    for fault in mirror.faults():  # of records the line, from 1, of images the name
        name = fault.get("image") or fault.get("member")
        found.append((fault["reason"], int(Path(name).stem) if name else fault["line"] - 1))
    assert Counter(found) == Counter(planted)
    assert any("_001.zip' and " in one["problem"] for one in mirror.faults())
    assert PHYSIONET in {x["licence"] for x in mirror.faults() if x.get("source") == "MIMIC-CXR"}

    assert mirror.run("--leave-out") == 0
    caption, text = load_mixture(mirror.folder / "imported" / "mixture.yaml").entries
    template = load_mixture("configs/gmai_vl/mixtures/gmai_vl_5_5m.yaml", check_files=False)
    for entry in (caption, text):
        same = next(one for one in template.entries if one.name == entry.name)
        for key in ("category", "ratios", "quality"):
            assert getattr(entry, key) == getattr(same, key)
    images = mirror.linked()
    assert len(images) > 1900
    assert all(shown == (n % 256, 2 + n // 256) for n, shown in images.items())
    assert not images.keys() & {n for reason, n in planted if reason.endswith("_image")}


def test_records_are_read_once_and_linked_anew_each_time(tmp_path, capsys, monkeypatch):
    mirror = Mirror(tmp_path, 30, 20)
    mirror.lines[OPEN][3] = b"{"
    mirror.members[1] = mirror.members[1][1:]
    mirror.write()
    (mirror.copy / "away").mkdir()
    lost = (mirror.copy / "files").rename(tmp_path / "lost")
    assert mirror.run() == 3
    assert len(mirror.faults()) == 22

    lost.rename(mirror.copy / "files")  # what was missing is found without reading a record again
    with monkeypatch.context() as patched:
        patched.delattr("data_tools.import_gmai.parse_raw")
        assert mirror.run("--leave-out") == 0
    reasons = [(fault["reason"], fault["line"]) for fault in mirror.faults()]
    assert reasons == [("not_json", 4), ("missing_image", 2)]
    assert len(mirror.linked()) == 28 + 20

    file = mirror.folder / OPEN / "annotations" / CAPTIONS
    file.write_bytes(file.read_bytes().replace(b"\n{\n", b"\n" + line(mirror.open[3]) + b"\n"))
    mirror.run()
    assert [fault["reason"] for fault in mirror.faults()] == ["missing_image"]


def test_a_set_without_its_annotations_is_one_clear_error(tmp_path, capsys):
    (tmp_path / OPEN / "annotations").mkdir(parents=True)
    assert main([str(tmp_path)]) == 1
    assert "has no annotation file" in capsys.readouterr().err

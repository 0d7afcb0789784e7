# SPDX-License-Identifier: Apache-2.0

"""A million records through forms, template writer, checks, store and output files, by `pipeline.run`.

The records are made up, one image for all, so no time goes into images: detection records of six labels,
two regions each. ``records_per_second`` counts the whole run, ``records_per_second_template`` the template
writer with its checks and the store. ``peak_memory_mib`` is the largest resident memory of any one process of
the run, ``peak_memory_all_mib`` of all of them together, counting shared pages in each.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
from printing import parser, quiet_stdout, show

from data_tools import readers, standardise
from data_tools.readers import SourceOptions
from data_tools.records import Drops, Label, Provenance, Record, Sample, Unit

UNIT = 500
"""Records of a unit, as a table's or a volume's."""

LABELS = ("nodule", "effusion", "cardiomegaly", "consolidation", "pneumothorax", "fracture")
SIDE = 512


class Options(SourceOptions):
    """The reader of made-up records."""

    reader: Literal["made_up"] = "made_up"
    default_source_task: ClassVar[str] = "2D detection"
    records: int


def units(options: Options) -> Iterator[Unit]:
    for first in range(0, options.records, UNIT):
        yield Unit(f"{first:08d}", (first, min(UNIT, options.records - first)))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    raise NotImplementedError("`read_unit` below stands for reading pictures")


def read_unit(
    source: Options, unit: Unit, *, folder: Path, taxonomy: Any, terms: Any, names: Any
) -> Any:
    """As `standardise.read_unit`, without images."""
    first, count = unit.payload
    made = []
    for number in range(first, first + count):
        names = (LABELS[number % 6], LABELS[number // 6 % 6])
        boxes = [(number * step % 300, number * step % 200, 400, 320) for step in (7, 11)]
        labels = tuple(Label(n, b, 9000) for n, b in zip(names, boxes, strict=True))
        file = f"case{number // 10:07d}/{number:08d}.png"
        name = f"2d#det#x_ray#{source.name}#{file.replace('/', '#')}"
        provenance = Provenance(
            source.name,
            source.dataset,
            source.licence,
            source.url,
            file,
            f"{number:064x}",
            {},
            f"{source.name}/case{number // 10:07d}",
        )
        record = Record(
            name,
            "images/00/picture.png",
            SIDE,
            SIDE,
            str(source.modality),
            str(source.department),
            source.clinical_task,
            "2D detection",
            labels,
            {"view": "PA"},
            provenance,
        )
        made.append(record)
    return standardise.UnitResult.of(made, samples=count)


class Peak:
    """The largest memory of this process and its children, looked at twenty times a second."""

    def __init__(self) -> None:
        self.one = self.all = 0
        self.over_time: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.05):
            sizes = []
            for process in [me, *me.children(recursive=True)]:
                try:
                    sizes.append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.one = max(self.one, *sizes)
            self.all = max(self.all, sum(sizes))
            self.over_time.append(max(sizes))


class Stages:
    """Hands the progress on and sums up the seconds of each stage, by the first word of its name."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._name = ""
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, *, total: int | None = None) -> None:
        self.end()
        self._name = name.split(" ", 1)[0]
        self._bar.stage(name, total=total)

    def advance(self, count: int = 1, **facts: Any) -> None:
        self._bar.advance(count, **facts)

    def end(self) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._since = now


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--records", type=int, default=1_000_000)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument(
        "--make",
        type=json.loads,
        default={"caption": 1},
        help="the job's section `make`; forms that are not named are not made",
    )
    options = made.parse_args()
    folder = options.work_dir / "corpus"
    with quiet_stdout():
        result = measure(folder, options.records, options.workers, options.make, options.seed)
    shutil.rmtree(folder)
    show(result, as_json=options.json)


def measure(
    folder: Path, records: int, workers: int, make: dict[str, float], seed: int
) -> dict[str, Any]:
    from PIL import Image

    from data_tools import pipeline
    from data_tools.command import Bar
    from data_tools.job import Job
    from data_tools.options import MakeOptions

    shutil.rmtree(folder, ignore_errors=True)
    picture = folder / "images" / "00" / "picture.png"
    picture.parent.mkdir(parents=True)
    Image.effect_noise((SIDE, SIDE), 60).save(picture)
    (folder / pipeline.WORK).mkdir()
    (folder / pipeline.WORK / "lock").touch()  # the image is of an earlier run, as it were
    forms = (
        "caption",
        "region_caption",
        "instruction",
        "dialogue",
        "perception",
        "text_single",
        "text_multi",
    )
    source = Options(
        name="chest",
        root=folder,
        records=records,
        dataset="Chest X-rays",
        licence="CC BY 4.0",
        modality="X-ray",
        department="Pulmonary Medicine",
        clinical_task="Disease Diagnosis",
    )
    job = Job(
        path=folder / "job.yaml",
        output=folder,
        seed=seed,
        workers=workers,
        sources=(source,),
        make=MakeOptions(**(dict.fromkeys(forms, 0) | {"chinese": 0} | make)),
    )
    started = time.perf_counter()
    with Peak() as peak, Bar() as bar:
        stages = Stages(bar)
        result = pipeline.run(job, pipeline.Selection(), progress=stages)
        stages.end()
    seconds = time.perf_counter() - started
    conversations = result.summary["conversations"]
    half = len(peak.over_time) // 2
    return {
        "records": result.summary["records"]["count"],
        "conversations": conversations["count"],
        "rejected": conversations["rejected"],
        "seconds": seconds,
        "seconds_by_stage": stages.seconds,
        "records_per_second": records / seconds,
        "records_per_second_template": records / stages.seconds["making"],
        "conversations_per_second": conversations["count"] / seconds,
        "workers": workers,
        "peak_memory_mib": peak.one / 2**20,
        "peak_memory_first_half_mib": max(peak.over_time[:half], default=0) / 2**20,
        "peak_memory_all_mib": peak.all / 2**20,
        "make": make,
    }


# The reader's workers import this file: the registry and the reading of a unit are told of it there too.
readers.READERS["made_up"] = "corpus"
sys.modules.setdefault("corpus", sys.modules[__name__])


def _stand_in_for_pictures() -> None:
    from data_tools import worker

    worker.read_unit = read_unit  # type: ignore[assignment]
    # All records have the one image; else they would be duplicates.
    standardise.duplicate_key = lambda record: bytes.fromhex(record.provenance.sha256)[-16:]


_stand_in_for_pictures()

if __name__ == "__main__":
    main()

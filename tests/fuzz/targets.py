# SPDX-License-Identifier: Apache-2.0

"""What is fuzzed: for each parser and reader some valid files, made here, and how one is opened.

Opening may raise `GMAIError` and, of the server, `ApiError`: those are documented. Anything else is a fault.
"""

import importlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import torch
import yaml
from PIL import Image

from tests.evaluate import files as benchmarks
from tests.examples.test_jobs import JOBS, load_make_data
from tests.medical_files import as_bytes, dicom, nifti

RECORD = {
    "id": "a", "image": ["x.png"], "width": 4, "height": 4,
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "CT."}],
}  # fmt: skip
MIXTURE = {
    "defaults": {"on_bad_sample": "skip"}, "exclude": ["e.csv"],
    "datasets": {"a": {"image_root": ".", "annotations": "a.jsonl", "ratio": 0.5, "size": 3}},
}  # fmt: skip
REQUEST: dict[str, Any] = {
    "model": "m", "max_tokens": 4, "temperature": 0.5, "stop": ["x"], "stream": True, "seed": 1,
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{benchmarks.base64_png(9)}"}},
    ]}],
}  # fmt: skip
DEEPSPEED = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "allgather_bucket_size": 5e8},
    "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
    "fp16": {"enabled": False, "loss_scale": 0}, "gradient_accumulation_steps": "auto",
}  # fmt: skip
CONFIG = {"train_dataloader": {"batch_size": 1}, "optim_wrapper": {"accumulative_counts": 1}}


@dataclass(frozen=True)
class Target:
    """Seeds and how one is opened.

    Args:
        seeds: file below a folder -> its valid content; each is mutated in turn.
        open: what reads ``folder``, in which the file ``name`` is mutated.
    """

    seeds: dict[str, bytes]
    open: Callable[[Path, str], object]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def targets(folder: Path) -> dict[str, Target]:
    """Return every target; what their readers need beside the seeds is written below the folder."""
    made = {
        "mixture": Target(
            {
                "m.yaml": dumped(MIXTURE),
                "n.yaml": yaml.safe_dump(MIXTURE).encode(),
                "authors.json": dumped(
                    {"a": {"image_dir": ".", "annotations": "a.json", "length": 2}}
                ),
            },
            _mixture,
        ),
        "job": Target(_jobs(), _job),
        "records": Target(
            {
                "a.jsonl": dumped(RECORD) + b"\n" + dumped({**RECORD, "image": "y.png"}),
                "a.json": dumped([RECORD, {"messages": [{"role": "user", "content": "?"}]}]),
                "a.parquet": _parquet([RECORD]),
            },
            _records,
        ),
        "image": Target(_images(), _image),
        "volume": Target(_volumes(folder), _volume),
        "dicom": Target(_dicoms(), _dicom),
        "page": Target(_dicoms() | _volumes(folder) | _images(), _page),
        "weights": Target(_weights(), _pickle),
        "request": Target({"r.json": dumped(REQUEST)}, _request),
        "deepspeed": Target({"d.json": dumped(DEEPSPEED)}, _deepspeed),
        "status": Target(
            {"status.json": dumped({"state": "training", "host": "h", "process": 1})}, _status
        ),
        "results": Target(_stored(), _results),
        "rows": Target(_tables(), _table),
        **_benchmarks(),
    }
    load_make_data().main([str(folder / "data")])
    for name, content in _dicoms().items():
        (folder / "data" / "dicom" / "head").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "dicom" / "head" / name).write_bytes(content)
    for root in sorted((folder / "data").iterdir()):
        made[f"reader {root.name}"] = _reader(root.name, root)
    return made


# --- training -------------------------------------------------------------------------------------


def _mixture(folder: Path, name: str) -> object:
    from gmai_xtuner.core.mixture import load_mixture

    return load_mixture(folder / name, check_files=False)


def _records(folder: Path, name: str) -> object:
    from gmai_xtuner.core.conversation import parse_raw
    from gmai_xtuner.core.errors import GMAIError
    from gmai_xtuner.core.records import iter_raw

    for raw in iter_raw(folder / name):
        try:
            parse_raw(raw, dataset="d")
        except GMAIError:
            continue
    return None


def _deepspeed(folder: Path, name: str) -> object:
    from gmai_xtuner.train.settings import read

    return read(str(folder / name), CONFIG).require()


def _status(folder: Path, name: str) -> object:
    from gmai_xtuner.train.status import describe_owner, read_status

    return describe_owner(read_status(folder))


def _weights() -> dict[str, bytes]:
    out, old = io.BytesIO(), io.BytesIO()
    tensors = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}
    torch.save(tensors, out)
    torch.save(
        {"state_dict": tensors, "meta": {"iter": 1}}, old, _use_new_zipfile_serialization=False
    )
    return {"w.bin": out.getvalue(), "s.pth": old.getvalue()}


def _pickle(folder: Path, name: str) -> object:
    from gmai_xtuner.checkpoint.weights import read_training_state, read_weights

    return (read_weights if name == "w.bin" else read_training_state)(folder / name)


# --- images ---------------------------------------------------------------------------------------


def _images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture, found = Image.fromarray(pixels), {}
    for suffix, options in (
        ("png", {}), ("jpg", {"progressive": True}), ("tif", {"compression": "tiff_deflate"}), ("bmp", {}),
        ("webp", {}), ("gif", {}), ("jp2", {}), ("lzw.tif", {"compression": "tiff_lzw"}),
    ):  # fmt: skip
        out = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix[-3:], suffix)
        picture.save(out, kind, **options)
        found[f"i.{suffix}"] = out.getvalue()
    deep = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 16).save(deep, "PNG")
    return found | {"deep.png": deep.getvalue()}


def _image(folder: Path, name: str) -> object:
    from gmai_xtuner.core.errors import GMAIError
    from gmai_xtuner.core.imaging.images import check_image, decode_rgb

    with suppress(GMAIError):
        check_image(folder / name, level="decode")
    return decode_rgb((folder / name).read_bytes(), name)


def _volumes(folder: Path) -> dict[str, bytes]:
    import SimpleITK

    values = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    found = {}
    for name in ("v.nii", "v.nii.gz"):
        found[name] = nifti(folder / name, values, np.diag([1.0, 1, 2, 1])).read_bytes()
    for name in ("v.nrrd", "v.mha", "v.mgz"):
        if name == "v.mgz":
            import nibabel

            nibabel.save(nibabel.MGHImage(values.astype(np.int32), np.eye(4)), folder / name)
        else:
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(values), str(folder / name), name == "v.nrrd"
            )
        found[name] = (folder / name).read_bytes()
    return found


def _volume(folder: Path, name: str) -> object:
    from gmai_xtuner.core.errors import Unusable
    from gmai_xtuner.core.imaging import volumes

    with suppress(Unusable):
        volumes.load(folder / name, max_voxels=10**8)
    return volumes.load_labels(folder / name, max_voxels=10**8)


def _dicoms() -> dict[str, bytes]:
    from pydicom.data import get_testdata_file

    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    plain = dicom(
        values, position=(0, 0, 0), RescaleSlope=2, WindowCenter=[4, 5], WindowWidth=[3, 9]
    )
    rle = dicom(values, position=(0, 0, 0))
    rle.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    deflated = dicom(values)
    deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    found = {"p.dcm": as_bytes(plain), "r.dcm": as_bytes(rle), "d.dcm": as_bytes(deflated)}
    for name in ("examples_palette.dcm", "JPEG2000.dcm", "SC_rgb_small_odd.dcm", "JPEG-LL.dcm"):
        path = get_testdata_file(name, download=False)
        if path is not None and Path(str(path)).stat().st_size < 2**18:
            found[name] = Path(str(path)).read_bytes()
    return found


def _dicom(folder: Path, name: str) -> object:
    from gmai_xtuner.core.imaging import dicom as headers
    from gmai_xtuner.core.imaging import dicom_pixels

    data = headers.open_dataset(folder / name)
    headers.header_of(data)
    if dicom_pixels.photometric_of(data) in dicom_pixels.COLOUR:
        return dicom_pixels.colours(data)
    dicom_pixels.intensities(data)
    dicom_pixels.file_table(data)
    return dicom_pixels.file_window(data)


def _page(folder: Path, name: str) -> object:
    from gmai_xtuner.demo.files import open_files
    from gmai_xtuner.demo.i18n import PageError
    from gmai_xtuner.demo.studies import Limits, first_view

    limits = Limits(pixels=10**6, voxels=10**7)
    for one in open_files([("mine", folder / name)], limits):
        if isinstance(one.study, PageError):
            one.study.said("zh")
        else:
            one.study.render(first_view(one.study))
    return None


# --- server ---------------------------------------------------------------------------------------


def _request(folder: Path, name: str) -> object:
    from gmai_xtuner.serve.protocol import ApiError, Limits, read_request

    try:
        asked = read_request((folder / name).read_bytes())
        asked.sampling(), asked.stops(), asked.new_tokens(limit=8)
        return asked.prompt(Limits(pixels=10**6), lambda image: torch.zeros(1))
    except ApiError as error:
        return json.dumps(error.body()).encode()


# --- corpus builder -------------------------------------------------------------------------------


def _jobs() -> dict[str, bytes]:
    found = {}
    for path in sorted(JOBS.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for source in content["sources"]:
            source["root"] = "package:pydicom/data/test_files"
        found[path.name] = dumped(content)
    return found | {"plain.yaml": (JOBS / "quickstart.yaml").read_bytes()}


def _job(folder: Path, name: str) -> object:
    from data_tools import job

    return job.load(folder / name, output=folder / "out")


def _reader(name: str, root: Path) -> Target:
    content = yaml.safe_load((JOBS / f"{name}.yaml").read_text(encoding="utf-8"))
    entry = {**content["sources"][0], "root": str(root)}
    if labels := entry.get("labels"):
        entry["labels"] = {str(code): label for code, label in labels.items()}
    if "table" in entry:  # of other files
        entry = {**entry, "table": None, "label": "folder", "columns": {}}
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    is_text = {path: path.suffix in (".json", ".xml", ".txt", ".yaml", ".csv") for path in paths}
    kept = [path for path in paths if is_text[path]][:3] or paths[:3]
    return Target(
        {str(path.relative_to(root)): path.read_bytes() for path in kept}, partial(_read, entry)
    )


def _read(entry: dict[str, Any], folder: Path, name: str) -> object:
    """Read the first units of a source, in which one file is another."""
    from data_tools import readers
    from data_tools.records import Unit
    from data_tools.standardise import read_unit
    from data_tools.worker import worker_taxonomy

    reader = importlib.import_module(readers.READERS[entry["reader"]])
    root = Path(entry["root"])
    whole = (root / name).read_bytes()
    (root / name).write_bytes((folder / name).read_bytes())
    try:
        units: Iterable[Unit] = reader.units(reader.Options(**entry))
        options = reader.Options(**entry)
        return [
            read_unit(options, unit, folder=folder / "corpus", taxonomy=worker_taxonomy(None))
            for unit in islice(units, 2)
        ]
    finally:
        (root / name).write_bytes(whole)


def _tables() -> dict[str, bytes]:
    import openpyxl

    book, out = openpyxl.Workbook(), io.BytesIO()
    for row in (["file", "label"], ["a.png", "x"], ["b.png", 3]):
        book.active.append(row)  # type: ignore[union-attr]
    book.save(out)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(out.getvalue())) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return {
        "t.csv": b'file,label\na.png,"x, y"\nb.png,3\n',
        "t.tsv": b"file\tlabel\na.png\tx\n",
        "t.jsonl": b'{"file": "a.png", "label": ["x"]}\n{"file": "b.png", "label": 2}\n',
        "t.xlsx": packed.getvalue(),
    }


def _table(folder: Path, name: str) -> object:
    from data_tools.readers.rows import read_table

    return list(read_table(folder / name, ["file", "label"], source="s"))


# --- evaluation -----------------------------------------------------------------------------------


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _benchmarks() -> dict[str, Target]:
    pair = {
        "image": {"bytes": benchmarks.png(1), "path": "1"},
        "question": "Is it?",
        "answer": "yes",
    }
    folder = {"vqa_rad": "v.json", "slake": "test.json", "omnimedvqa": "o.json", "huatuo": "h.json"}
    tsv = "\n".join("\t".join(row) for row in (benchmarks.GMAI_HEADER, benchmarks.gmai_row(1)))
    csv = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    csv += "a.jpg,Q,x,A:x,B:y,C:z,D:w,A\n"
    contents = {
        "vqa_rad": dumped([benchmarks.vqa_rad_record(1)]),
        "slake": dumped([benchmarks.slake_record(1)]),
        "omnimedvqa": dumped([benchmarks.omnimedvqa_record("1")]),
        "huatuo": dumped([benchmarks.huatuo_record()]),
        "path_vqa": _parquet([pair, pair]),
        "gmai_mmbench": tsv.encode(),
        "pmc_vqa": csv.encode(),
    }
    names = folder | {
        "path_vqa": "path-vqa/test.parquet",
        "gmai_mmbench": "GMAI_mm_bench_VAL.tsv",
        "pmc_vqa": "t.csv",
    }
    return {
        f"benchmark {name}": Target({names[name]: content}, partial(_benchmark, name))
        for name, content in contents.items()
    }


def _benchmark(which: str, folder: Path, name: str) -> object:
    from gmai_xtuner.core.errors import GMAIError
    from gmai_xtuner.evaluate.benchmarks import find_benchmarks, load_benchmark

    find_benchmarks(folder)
    read = load_benchmark(which, folder / name, require_images=False)
    for image in (image for question in read.questions for image in question.images):
        try:
            image.read() if hasattr(image, "read") else None
        except GMAIError:
            continue
    return read


IDENTITY = {
    "benchmark": "b",
    "variant": "v",
    "model": "m",
    "model_name": "n",
    "generation": {"a": 1},
}
ANSWER = {
    "id": "1", "prompt": "p", "answer": "a", "seconds": 1.0, "model": "m", "protocol": "p/1",
    "generation": {"max_new_tokens": 4},
}  # fmt: skip


def _stored() -> dict[str, bytes]:
    from gmai_xtuner.evaluate.results import Cell, Result, as_json
    from gmai_xtuner.evaluate.store import FORMAT, RUN_FILE

    cells = {"micro": Cell(1, 1.0, 0.0, None)}
    result = Result(
        "b", "v", "p", 1, "d", "s", "n", "m", {}, 1, 1, None, False, {}, {}, cells, {"k": cells}
    )
    return {
        "result.json": dumped(as_json(result)),
        RUN_FILE: dumped({"format": FORMAT, **IDENTITY}),
        "answers-0.jsonl": dumped(ANSWER) + b"\n",
        "scores.jsonl": dumped({"id": "1", "question": "0a1b", "target": "A", "value": 1.0})
        + b"\n",
    }


def _results(folder: Path, name: str) -> object:
    from gmai_xtuner.evaluate.results import read_result, read_scores
    from gmai_xtuner.evaluate.store import RUN_FILE, AnswerStore, Identity

    if name == "result.json":
        return read_result(folder).problems
    if name == "scores.jsonl":
        return read_scores(folder)
    if name.startswith("answers"):
        (folder / RUN_FILE).write_bytes(_stored()[RUN_FILE])
    return AnswerStore(folder, Identity(**IDENTITY)).read()

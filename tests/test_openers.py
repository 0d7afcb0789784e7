# SPDX-License-Identifier: Apache-2.0

"""One opener for untrusted bytes: who may call what opens images, volumes, archives, tables and weights."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_imports import modules

IMAGING = "gmai_xtuner.core.imaging"
SLIDES = "data_tools.readers.slide_files"
OPENERS: dict[str, tuple[str, ...]] = {
    "PIL.Image.open": (),
    "PIL.Image.OPEN": (f"{IMAGING}.images",),
    "PIL.ImageFile.Parser": (),
    "cv2.imread": (),
    "cv2.imdecode": (f"{IMAGING}.images",),
    "simplejpeg.decode_jpeg": (f"{IMAGING}.damage",),
    "pydicom.dcmread": (IMAGING,),
    "pydicom.filereader.dcmread": (),
    "pydicom.pixels.pixel_array": (IMAGING,),
    "highdicom.imread": (),
    "nibabel.load": (IMAGING,),
    "SimpleITK.ReadImage": (),
    "SimpleITK.ImageFileReader": (IMAGING,),
    "tifffile.TiffFile": (SLIDES, "data_tools.readers.arrays"),
    "tifffile.imread": (),
    "openslide.OpenSlide": (SLIDES,),
    "openslide.open_slide": (),
    "av.open": ("data_tools.readers.video_frames",),
    "gzip.open": (IMAGING,),
    "gzip.GzipFile": (IMAGING,),
    "gzip.decompress": (),
    "bz2.BZ2File": (IMAGING,),
    "bz2.open": (),
    "zipfile.ZipFile": (
        *("gmai_xtuner.checkpoint.weights", "gmai_xtuner.core.members"),
        *("data_tools.readers.arrays", "data_tools.readers.rows"),
    ),
    "tarfile.open": ("gmai_xtuner.core.members",),
    "shutil.unpack_archive": (),
    "pyarrow.parquet.ParquetFile": (
        *("gmai_xtuner.core", "gmai_xtuner.evaluate.benchmarks.rows"),
        "data_tools.import_gmai",  # what it has written itself
    ),
    "pyarrow.parquet.read_table": (),
    "pandas.read_parquet": (),
    "pandas.read_pickle": (),
    "openpyxl.load_workbook": (
        *("data_tools.readers.rows", "gmai_xtuner.evaluate.answerers.stored"),
    ),
    "torch.load": ("gmai_xtuner.checkpoint.weights",),
    "torch.jit.load": (),
    "joblib.load": (),
    "yaml.load": (),
    "yaml.unsafe_load": (),
    "yaml.full_load": (),
    # Below: only files and messages that the project has written itself, or bounded texts.
    "json.loads": (
        *("gmai_xtuner.checkpoint", "gmai_xtuner.data", "gmai_xtuner.train"),
        *("gmai_xtuner.preflight.data", "gmai_xtuner.core.archives", "gmai_xtuner.core.exclusion"),
        *("gmai_xtuner.core.yaml_lines", "data_tools.contamination.report"),
        *("data_tools.writers.ledger", "data_tools.import_gmai", "data_tools.output"),
    ),
    "json.load": (),
    "json.JSONDecoder": (
        *("gmai_xtuner.core.strict_json", "gmai_xtuner.evaluate.scoring.text"),
        "gmai_xtuner.evaluate.benchmarks.rows",
    ),
    "numpy.load": ("gmai_xtuner.data",),
    "pyarrow.ipc.open_file": (
        *("gmai_xtuner.data", "gmai_xtuner.preflight.pictures", "gmai_xtuner.core"),
    ),
    "pickle.load": ("data_tools.writers.openai_batch",),
    "pickle.loads": ("data_tools.readers.rows", "data_tools.worker"),
    "pickle.Unpickler": ("gmai_xtuner.evaluate.benchmarks.rows",),  # numbers and texts alone
    # By content: forms and tables that travel with the package.
    "yaml.safe_load": (
        *("data_tools.checks.terms", "data_tools.forms.language", "data_tools.job"),
        *("data_tools.lexicon", "data_tools.licences", "gmai_xtuner.evaluate.tables"),
        *("gmai_xtuner.evaluate.scoring", "gmai_xtuner.demo.i18n"),
        "gmai_xtuner.train.settings",
    ),
}
"""What opens a file -> modules, or packages of them, that may use it; they bound it or know the file."""


def used(source: str) -> set[str]:
    """Return the dotted names that a module uses, as its imports resolve them."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    found = set(known.values())
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in known:
            found.add(".".join((known[node.id], *parts)))
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from PIL import Image\nwith Image.open(x): pass", "PIL.Image.open"),
        ("import PIL.Image as P\nf = P.open", "PIL.Image.open"),
        ("def f():\n    from torch import load", "torch.load"),
        ("import torch\ntorch.jit.load(x)", "torch.jit.load"),
        ("import pyarrow.parquet\npyarrow.parquet.read_table(x)", "pyarrow.parquet.read_table"),
    ],
)
def test_uses_are_found_however_they_are_imported(source, name):
    assert name in used(source)


def test_untrusted_bytes_are_opened_in_the_named_modules_alone():
    wrong = []
    idle = {(name, one) for name, allowed in OPENERS.items() for one in allowed if one != IMAGING}
    for module, path in modules():
        for name in used(Path(path).read_text(encoding="utf-8")) & OPENERS.keys():
            own = [one for one in OPENERS[name] if f"{module}.".startswith(f"{one}.")]
            if not own:
                wrong.append(f"{module} uses {name}; {OPENERS[name] or 'nobody'} may")
            idle -= {(name, one) for one in own}
    assert not wrong
    assert not idle, "no longer used there: take these out of the list"

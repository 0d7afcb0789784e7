"""Uploaded files -> studies, by what they hold and not by their names."""

from __future__ import annotations

import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.dicom import is_dicom
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.imaging.volumes import is_nifti
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.limits import Limits
from gmai_xtuner.demo.medical_files import open_dicom, open_nifti
from gmai_xtuner.demo.studies import Facts, Picture, Study

_REASONS = {"enormous_image": "too_large_image", "unsupported_image": "unsupported"}
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Opened:
    """What became of one or several files.

    Args:
        name: of the file, as its owner calls it: for messages to him, never to be kept.
        study: what it is, or why it can't be opened.
    """

    name: str
    study: Study | PageError


def open_files(files: Sequence[tuple[str, Path]], limits: Limits) -> list[Opened]:
    """Open what came in one upload; DICOM files of one series become one volume.

    Args:
        files: names, and where their bytes lie; they stay as they are.
        limits: what is refused.
    """
    opened: list[Opened] = []
    with tempfile.TemporaryDirectory(prefix="gmai_demo_") as scratch:
        plain, refused = _unpacked(files, Path(scratch), limits)
        opened += refused
        dicom = [(name, path) for name, path in plain if is_dicom(path)]
        others = [entry for entry in plain if entry not in dicom]
        opened += [Opened(name, _open_one(path, limits)) for name, path in others]
        if dicom:
            studies = open_dicom([path for _, path in dicom], limits)
            # A series has many names; a file for itself keeps its own.
            alone = len(studies) == len(dicom)
            opened += [
                Opened(dicom[at][0] if alone else dicom[0][0], study)
                for at, study in enumerate(studies)
            ]
    return opened


def _open_one(path: Path, limits: Limits) -> Study | PageError:
    try:
        if path.stat().st_size == 0:
            raise PageError("empty_file")
        if is_nifti(path):
            return open_nifti(path, limits)
        image = open_rgb(path, max_pixels=limits.pixels)
    except ImageError as error:
        return PageError(_REASONS.get(error.reason, "damaged"), limit=f"{limits.pixels:,}")
    except PageError as error:
        return error
    return Picture(image, Facts("picture", "", f"{image.width} × {image.height}"))


def _unpacked(
    files: Iterable[tuple[str, Path]], scratch: Path, limits: Limits
) -> tuple[list[tuple[str, Path]], list[Opened]]:
    """The files, those inside ZIPs in the place of the ZIPs; and what is refused."""
    plain: list[tuple[str, Path]] = []
    refused: list[Opened] = []
    budget = _Budget(limits)
    for number, (name, path) in enumerate(files):
        if not zipfile.is_zipfile(path) or is_dicom(path):
            plain.append((name, path))
            continue
        folder = scratch / str(number)
        folder.mkdir()
        try:
            inside = list(_members(path, folder, budget))
            if not inside:
                raise PageError("empty_zip")
            plain += inside
        except PageError as error:
            refused.append(Opened(name, error))
    return plain, refused


class _Budget:
    """What all ZIPs of one upload may still unpack; what came out of one that is refused counts."""

    def __init__(self, limits: Limits) -> None:
        self._bytes = limits.upload_bytes * limits.unpacked
        self._entries, self._limit = 0, limits.zip_entries

    def take_entries(self, count: int) -> None:
        total = self._entries + count
        if total > self._limit:
            raise PageError("zip_entries", count=total, limit=self._limit)
        self._entries = total

    def take_bytes(self, count: int) -> None:
        self._bytes -= count
        if self._bytes < 0:
            raise PageError("zip_too_large")


def _members(path: Path, folder: Path, budget: _Budget) -> Iterator[tuple[str, Path]]:
    """Files of a ZIP, written under numbers: no name inside it decides where anything goes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if _is_content(entry)]
            budget.take_entries(len(entries))
            for number, entry in enumerate(entries):
                if entry.flag_bits & 1:
                    raise PageError("zip_encrypted")
                target = folder / str(number)
                # The sizes in its directory are claims; what comes out is counted.
                with archive.open(entry) as source, target.open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        budget.take_bytes(len(chunk))
                        file.write(chunk)
                if zipfile.is_zipfile(target) and not is_dicom(target):
                    raise PageError("zip_nested")
                yield PurePosixPath(entry.filename).name, target
    except PageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PageError("damaged") from error


def _is_content(entry: zipfile.ZipInfo) -> bool:
    """Not a folder, nothing hidden, no index of a disc."""
    parts = PurePosixPath(entry.filename).parts
    return (
        bool(parts)
        and not entry.is_dir()
        and not any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts)
        and parts[-1].upper() != "DICOMDIR"
    )

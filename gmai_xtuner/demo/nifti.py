"""NIfTI -> a volume in RAS+, by nibabel."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.demo.limits import Limits
from gmai_xtuner.demo.studies import Facts, Volume
from gmai_xtuner.demo.windows import foreground_window
from gmai_xtuner.demo.words import PageError

_MAGIC_AT = ((344, (b"n+1\0",)), (4, (b"n+2\0",)))
"""Where NIfTI-1 and NIfTI-2 name themselves; pairs of .hdr and .img are not taken."""


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI, plain or in gzip; by its content, whatever its name."""
    try:
        with path.open("rb") as file:
            start = file.read(348)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                start = file.read(348)
    except (OSError, EOFError, zlib.error):
        return False
    return any(start[at : at + 4] in magics for at, magics in _MAGIC_AT)


def open_nifti(path: Path, limits: Limits) -> Volume:
    """The volume of a file; a fourth axis becomes channels.

    Raises:
        PageError: it is damaged, too large, too large with square pixels, or holds no grey levels.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    bad = (
        *(ImageFileError, HeaderDataError, WrapStructError, zlib.error, OSError, EOFError),
        *(ValueError, RuntimeError, OverflowError, KeyError, TypeError),
        MemoryError,  # a header that promises more than there is
    )
    try:
        values, affine, oriented = _read(path, limits)
    except PageError:
        raise
    except bad as error:
        raise PageError("damaged") from error
    shape = values.shape if values.shape[3] > 1 else values.shape[:3]
    notes: list[str] = [] if oriented else ["no_orientation"]
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            if not finite.any():
                raise PageError("damaged")
            notes.append("not_finite")
            values = np.where(finite, values, values[finite].min())
    elif values.dtype.kind not in "iub":
        raise PageError("nifti_type", type=str(values.dtype))
    values, spacing = to_ras(values, affine)
    return Volume(
        values,
        Facts("NIfTI", "", " × ".join(map(str, shape)), tuple(notes)),
        spacing,
        ("z", "y", "x"),
        foreground_window(values),
        hounsfield=True,  # the format does not say; the presets are there for who knows
    ).checked(limits)


def to_ras(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Turn to the nearest of RAS+, never resampled; and the spacing there.

    Args:
        values: ``[I, J, K, C]``.
        affine: ``[4, 4]``, from indices to RAS+ millimetres.

    Raises:
        PageError: the affine can't be inverted.
    """
    from nibabel import orientations

    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise PageError("no_directions")
    turn = orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise PageError("no_directions")
    turned = affine @ orientations.inv_ornt_aff(turn, values.shape[:3])
    x, y, z = (float(length) for length in np.linalg.norm(turned[:3, :3], axis=0))
    return orientations.apply_orientation(values, turn), (x, y, z)


def _read(path: Path, limits: Limits) -> tuple[np.ndarray, np.ndarray, bool]:
    """``[I, J, K, C]`` as stored, the affine to RAS+, and whether the file names an orientation."""
    import nibabel

    with path.open("rb") as file:
        suffix = ".nii.gz" if file.read(2) == b"\x1f\x8b" else ".nii"
    with tempfile.TemporaryDirectory(prefix="gmai_demo_") as folder:
        # nibabel goes by names, so the file gets one more
        link = Path(folder) / f"volume{suffix}"
        link.symlink_to(path.resolve())
        image: Any = nibabel.load(link, mmap=False)
        shape = tuple(int(length) for length in image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) == 2:
            shape = (*shape, 1)
        if not 3 <= len(shape) <= 5 or (len(shape) == 5 and shape[3] != 1) or 0 in shape:
            raise PageError("nifti_axes", shape=" × ".join(map(str, image.shape)))
        limits.check_pixels(shape[0], shape[1])
        limits.check_voxels(int(np.prod(shape, dtype=object)))
        stored = image.header.get_data_dtype()
        if stored.fields is not None or stored.kind == "c":
            raise PageError("nifti_type", type=str(stored)[:60])
        proxy = image.dataobj
        values = np.asarray(proxy.get_unscaled() if _unscaled(proxy) else proxy)
        affine = np.asarray(image.affine, dtype=np.float64)
        oriented = int(image.header["sform_code"]) or int(image.header["qform_code"])
        return values.reshape((*shape[:3], -1)), affine, bool(oriented)


def _unscaled(proxy: Any) -> bool:
    """Whether stored numbers are the intensities: then they need no floats."""
    return proxy.slope == 1 and proxy.inter == 0

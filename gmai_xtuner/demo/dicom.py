"""DICOM files -> frames, or a volume of a series. Only modality and sizes leave a header.

Stored values become grey levels in the standard's order (PS3.4 annex N): decoding, palettes looked up;
modality LUT or rescale slope and intercept, those of a frame's own functional groups too; the file's VOI
LUT or window, of the frame where it has one; MONOCHROME1, where the smallest value is white, turned round.
Padding becomes the smallest value.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.demo.limits import Limits
from gmai_xtuner.demo.nifti import to_ras
from gmai_xtuner.demo.studies import SPATIAL, Facts, Frames, Study, Volume
from gmai_xtuner.demo.windows import PRESETS, Window, foreground_window
from gmai_xtuner.demo.words import PageError

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
NO_PICTURES = ("RTDOSE", "SEG", "RTSTRUCT", "REG", "RWV", "PR", "KO", "SR", "DOC", "RTPLAN", "ECG")
"""Objects that are numbers of a calculation or text, not a picture of the patient."""

_CODE = re.compile(r"[A-Z]{1,8}")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNEVEN = 0.1
"""How far a slice may lie from where even spacing puts it, as a share of the spacing."""


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: with its preamble, or from before there was one."""
    with path.open("rb") as file:
        start = file.read(132)
    # Group 0008 comes first in a file without a preamble, in either order of bytes.
    return start[128:] == b"DICM" or start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def open_dicom(paths: Sequence[Path], limits: Limits) -> list[Study | PageError]:
    """The studies of files that came together: a series with places becomes a volume, others stay alone.

    Args:
        paths: in the order in which they came.
        limits: of pixels and voxels.

    Returns:
        In the order of their first file; an error in the place of what can't be opened.
    """
    groups: dict[object, list[Any]] = {}
    for number, path in enumerate(paths):
        try:
            data = _read(path)
            groups.setdefault(_series(data) or number, []).append(data)
        except PageError as error:
            groups[number] = [error]
    opened: list[Study | PageError] = []
    for group in groups.values():
        if len(group) > 1:
            try:
                opened.append(_volume(group, limits))
                continue
            except _NoStack:
                try:
                    opened.append(_pages(group, limits))
                    continue
                except _NoStack:
                    pass  # each picture for itself
            except PageError as error:
                opened.append(error)
                continue
        for data in group:
            try:
                opened.append(data if isinstance(data, PageError) else _frames(data, limits))
            except PageError as error:
                opened.append(error)
    return opened


class _NoStack(Exception):
    """Files of one series that don't lie one behind the other."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(path: Path) -> Any:
    import pydicom

    try:
        with _quiet():
            data = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in data.file_meta:
                implicit, little = data.original_encoding
                data.file_meta.TransferSyntaxUID = (
                    pydicom.uid.ImplicitVRLittleEndian
                    if implicit
                    else pydicom.uid.ExplicitVRLittleEndian
                    if little
                    else pydicom.uid.ExplicitVRBigEndian
                )
    except Exception as error:  # whatever a damaged header makes pydicom stumble over
        raise PageError("damaged") from error
    if not any(key in data for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise PageError("no_picture", kind=_modality(data) or "DICOM")
    if _modality(data) in NO_PICTURES:
        raise PageError("no_picture", kind=_modality(data))
    return data


def _modality(data: Any) -> str:
    """The code, if it looks like one: header values are free text of whoever wrote them."""
    found = _CODE.fullmatch(str(data.get("Modality", "")).strip())
    return found[0] if found else ""


def _series(data: Any) -> str | None:
    """What files of one stack share; None for a file that is a stack or a picture of its own."""
    try:
        placed = len(data.ImageOrientationPatient) == 6 and len(data.ImagePositionPatient) == 3
    except (AttributeError, TypeError):
        return None
    if not placed or int(data.get("NumberOfFrames") or 1) > 1:
        return None
    return str(data.get("SeriesInstanceUID", "")) or None


@dataclass(frozen=True)
class _Shape:
    frames: int
    rows: int
    columns: int


def _shape(data: Any, limits: Limits) -> _Shape:
    try:
        shape = _Shape(
            int(data.get("NumberOfFrames") or 1), int(data.Rows or 0), int(data.Columns or 0)
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise PageError("damaged") from error
    limits.check_pixels(shape.columns, shape.rows)
    samples = 3 if str(data.get("PhotometricInterpretation", "")) in COLOUR else 1
    limits.check_voxels(shape.frames * shape.rows * shape.columns * samples)
    return shape


def _frames(data: Any, limits: Limits) -> Frames:
    shape = _shape(data, limits)
    photometric = str(data.get("PhotometricInterpretation", ""))
    size = f"{shape.columns} × {shape.rows}" + (f" × {shape.frames}" if shape.frames > 1 else "")
    facts = Facts("DICOM", _modality(data), size)
    if photometric in COLOUR:
        return Frames(_colours(data, shape), facts)
    if photometric not in GREY:
        raise PageError("photometric", name=photometric[:20])
    values = np.stack([_intensities(data, frame) for frame in range(shape.frames)])
    own = [_window_of(data, frame) for frame in range(shape.frames)]
    known = [window for window in own if window is not None]
    lookup = _lookup(data)
    if len(known) == shape.frames:
        windows = known if len(set(known)) > 1 else known[:1]
    else:
        windows = [_fallback(data, values)]
    return Frames(
        values,
        facts,
        windows,
        inverted=photometric == "MONOCHROME1",
        lookup=lookup,
        own_window=len(known) == shape.frames or lookup is not None,
        hounsfield=facts.modality == "CT",
    )


def _pages(group: Sequence[Any], limits: Limits) -> Frames:
    """Pictures of one series that are no stack, such as radial slices, one after the other by their number.

    Raises:
        _NoStack: they differ in size or kind.
        PageError: one of them can't be read, or there are too many pixels.
    """
    shape = _shape(group[0], limits)
    limits.check_voxels(len(group) * shape.rows * shape.columns)
    group = sorted(group, key=lambda data: _number(data.get("InstanceNumber")))
    kinds = {str(data.get("PhotometricInterpretation", "")) for data in group}
    if len(kinds) > 1 or not kinds <= set(GREY) or any(_shape(d, limits) != shape for d in group):
        raise _NoStack
    pages = [_frames(data, limits) for data in group]
    if any(page.lookup for page in pages):
        raise _NoStack
    first = pages[0]
    facts = Facts("DICOM", first.facts.modality, f"{shape.columns} × {shape.rows} × {len(pages)}")
    windows = [page.window for page in pages if page.window is not None]
    values = np.concatenate([page.values for page in pages])
    return replace(first, values=values, facts=facts, windows=windows, known_extent=[])


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0


def _decode(data: Any, frame: int) -> np.ndarray:
    from pydicom.pixels import pixel_array

    try:
        with _quiet():
            return np.asarray(pixel_array(data, index=frame))
    except Exception as error:  # decoders raise whatever they like
        raise PageError("pixels") from error


def _colours(data: Any, shape: _Shape) -> np.ndarray:
    """uint8 ``[N, H, W, 3]``."""
    from pydicom.pixels import apply_color_lut

    palette = str(data.PhotometricInterpretation) == "PALETTE COLOR"
    frames = []
    for frame in range(shape.frames):
        stored = _decode(data, frame)
        if palette:
            try:
                with _quiet():
                    stored = apply_color_lut(stored, data)[..., :3]
            except Exception as error:  # a palette that is damaged in any way
                raise PageError("pixels") from error
        if stored.ndim != 3 or stored.shape[-1] != 3:
            raise PageError("pixels")
        if stored.dtype != np.uint8:
            bits = (
                stored.dtype.itemsize * 8
                if palette
                else int(data.get("BitsStored", stored.dtype.itemsize * 8))
            )
            stored = np.minimum(stored.astype(np.uint32) >> max(0, bits - 8), 255).astype(np.uint8)
        frames.append(stored)
    return np.stack(frames)


def _intensities(data: Any, frame: int = 0) -> np.ndarray:
    """``[H, W]`` in the unit of the modality, padding set to the smallest value."""
    from pydicom.pixels import apply_modality_lut

    stored = _decode(data, frame)
    if stored.ndim != 2:
        raise PageError("pixels")
    own = _functional_group(data, frame, "PixelValueTransformationSequence")
    try:
        with _quiet():
            if own is not None:
                slope, intercept = float(own.RescaleSlope), float(own.RescaleIntercept)
                values = stored * slope + intercept
            else:
                values = np.asarray(apply_modality_lut(stored, data))
    except Exception as error:  # as many kinds of damage as there are elements
        raise PageError("pixels") from error
    if not np.isfinite(values).all():
        raise PageError("pixels")
    padding = _padding(data, stored)
    if padding is not None and padding.any() and not padding.all():
        values = np.where(padding, values[~padding].min(), values)
    # Whole numbers stay whole and small: half the memory of float32, a quarter of pydicom's float64.
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if low >= -32768 and high <= 32767 and (values == np.rint(values)).all():
            return values.astype(np.int16)
        return values.astype(np.float32)
    return values


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the stored values are no measurement, after ``PixelPaddingValue`` and its range."""
    value = data.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = data.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored >= low) & (stored <= high)


def _functional_group(data: Any, frame: int, name: str) -> Any | None:
    """The item of an enhanced object's sequence that holds for a frame."""
    try:
        own = data.PerFrameFunctionalGroupsSequence[frame]
        if name in own:
            return own[name].value[0]
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    try:
        return data.SharedFunctionalGroupsSequence[0][name].value[0]
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


def _window_of(data: Any, frame: int = 0) -> Window | None:
    """The file's first window that can be applied; None without one."""
    source = _functional_group(data, frame, "FrameVOILUTSequence") or data
    centers, widths = _listed(source.get("WindowCenter")), _listed(source.get("WindowWidth"))
    function = str(source.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    for center, width in zip(centers, widths, strict=False):
        try:
            return Window(center, width, function)  # type: ignore[arg-type]
        except ValueError:
            continue
    return None


def _listed(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    try:
        return [
            float(item) for item in ([value] if isinstance(value, int | float | str) else value)
        ]
    except (TypeError, ValueError):
        return []


def _fallback(data: Any, values: np.ndarray) -> Window:
    return PRESETS["soft_tissue"] if _modality(data) == "CT" else foreground_window(values)


def _lookup(data: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """The file's VOI LUT, which goes before its window."""
    if not data.get("VOILUTSequence"):
        return None
    from pydicom.pixels import apply_voi

    def apply(values: np.ndarray) -> np.ndarray:
        with _quiet():
            shown = apply_voi(np.rint(values).astype(np.int64), data, index=0)
            top = 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return np.floor(np.clip(shown / top, 0, 1) * 255 + 0.5).astype(np.uint8)

    try:
        apply(np.zeros((1, 1), dtype=np.int16))
    except Exception as error:  # a table that is damaged in any way
        raise PageError("pixels") from error
    return apply


def _volume(group: Sequence[Any], limits: Limits) -> Volume:
    """Slices of one series in RAS+.

    Raises:
        _NoStack: they differ in size or direction, or two lie at one place.
        PageError: a slice can't be read or is too large with square pixels, or there are too many voxels.
    """
    first = group[0]
    shape = _shape(first, limits)
    axes = np.array(first.ImageOrientationPatient, dtype=float)
    for data in group:
        this = _shape(data, limits)
        same = np.allclose(np.array(data.ImageOrientationPatient, dtype=float), axes, atol=1e-3)
        grey = str(data.get("PhotometricInterpretation", "")) in GREY
        if this != shape or not same or not grey or _series(data) is None:
            raise _NoStack
    normal = np.cross(axes[:3], axes[3:])
    places = [float(np.dot(normal, np.array(d.ImagePositionPatient, dtype=float))) for d in group]
    order = np.argsort(places, kind="stable")
    slices = [group[at] for at in order]
    distances = np.diff(np.array(places)[order])
    spacing = float(np.median(distances))
    if spacing <= 0 or distances.min() < 1e-3 * max(spacing, 1e-6):
        raise _NoStack
    limits.check_voxels(len(slices) * shape.rows * shape.columns)
    values = np.stack([_intensities(data) for data in slices])
    pixel = _listed(first.get("PixelSpacing"))
    if len(pixel) != 2 or min(pixel) <= 0:
        raise _NoStack
    ends = [np.array(slices[at].ImagePositionPatient, dtype=float) for at in (0, -1)]
    affine = np.eye(4)
    affine[:3, 0] = (ends[1] - ends[0]) / (len(slices) - 1)
    affine[:3, 1] = axes[3:] * pixel[0]
    affine[:3, 2] = axes[:3] * pixel[1]
    affine[:3, 3] = ends[0]
    ras = _LPS_TO_RAS @ affine
    turned, millimetres = to_ras(values[..., None], ras)
    own_axis = SPATIAL[int(np.abs(ras[:3, 0]).argmax())]
    even = bool(np.abs(distances - spacing).max() <= _UNEVEN * spacing)
    others = tuple(axis for axis in ("z", "y", "x") if axis != own_axis)
    middle = slices[len(slices) // 2]
    own = _window_of(middle)
    size = f"{shape.columns} × {shape.rows} × {len(slices)}"
    return Volume(
        turned,
        Facts("DICOM", _modality(first), size, () if even else ("uneven",)),
        millimetres,
        (own_axis, *others) if even else (own_axis,),  # type: ignore[arg-type]
        own or _fallback(middle, values),
        own_window=own is not None,
        inverted=str(middle.PhotometricInterpretation) == "MONOCHROME1",
        hounsfield=_modality(first) == "CT",
    ).checked(limits)

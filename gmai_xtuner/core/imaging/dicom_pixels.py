"""Stored values of a DICOM image -> intensities and grey levels, in the standard's order (PS3.4 annex N).

1. decoding (pydicom's decoders, YBR turned into RGB); palettes are looked up;
2. modality LUT or rescale slope and intercept, those of the frame's functional groups first;
3. VOI LUT or window, those of the frame's functional groups first;
4. MONOCHROME1, where the smallest value is white, is inverted.

An enhanced object keeps 2 and 3 in its functional groups, for all frames or for each of its own
(PS3.3 C.7.6.16), and has none of them at its top.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import (
    NO_PICTURE,
    modality_code,
    numbers,
    quiet,
    words_of,
)
from gmai_xtuner.core.imaging.windows import Scale, Window

CANT_DECODE = "pixel data can't be read"
UNKNOWN_COLOURS = "unknown photometric interpretation"
NO_MODALITY_LUT = "modality transform that can't be applied"
NO_WINDOW = "window that can't be applied"
NO_LUT = "VOI LUT that can't be applied"
NO_PALETTE = "palette that can't be applied"
BAD_PIXELS = (CANT_DECODE, NO_MODALITY_LUT, NO_LUT, NO_PALETTE)

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_OTHER_COLOURS = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB")
"""DICOM's other names; any other text may be what somebody typed, and is not repeated."""


def photometric_of(data: Any) -> str:
    """Return the photometric interpretation, one of `GREY` and `COLOUR`.

    Raises:
        Unusable: it is another one.
    """
    found = str(data.get("PhotometricInterpretation", ""))
    if found not in GREY + COLOUR:
        raise Unusable(UNKNOWN_COLOURS, found if found in _OTHER_COLOURS else "")
    return found


def functional_group(data: Any, frame: int, name: str) -> Any | None:
    """Return the item of an enhanced object's macro that holds for a frame: its own, or that of all."""
    for groups, at in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        try:
            return data[groups].value[at][name].value[0]
        except (AttributeError, IndexError, KeyError, TypeError):
            continue
    return None


def intensities(data: Any, frame: int = 0) -> np.ndarray:
    """Return ``[H, W]`` in the unit of the modality (Hounsfield for CT), padding set to the smallest value.

    Raises:
        Unusable: it can't be decoded, or its rescale can't be applied.
    """
    from pydicom.pixels import apply_modality_lut

    stored = decode(data, frame)
    if stored.ndim != 2:
        raise Unusable(CANT_DECODE, f"grey levels of shape {stored.shape}")
    own = functional_group(data, frame, "PixelValueTransformationSequence")
    try:
        with quiet():
            if own is not None:
                values = stored * float(own.RescaleSlope) + float(own.RescaleIntercept)
            else:
                values = np.asarray(apply_modality_lut(stored, data))
    except Exception as error:  # as many kinds of damage as there are elements
        raise Unusable(NO_MODALITY_LUT, words_of(error, data)) from error
    if not np.isfinite(values).all():
        raise Unusable(NO_MODALITY_LUT, "it gives infinite values")
    padding = _padding(data, stored)
    if padding is not None and padding.any() and not padding.all():
        values = np.where(padding, values[~padding].min(), values)
    return values


def has_pixels(data: Any) -> bool:
    """Return True for a data set with pixels of any type."""
    return any(key in data for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))


def decode(data: Any, frame: int = 0) -> np.ndarray:
    """Return one frame as stored, ``[H, W]`` or RGB ``[H, W, 3]``.

    Raises:
        Unusable: there are no pixels, they are too few, or no decoder takes them.
    """
    from pydicom.pixels import pixel_array

    if not has_pixels(data):
        raise Unusable(NO_PICTURE, modality_code(data))
    try:
        with quiet():
            return np.asarray(pixel_array(data, index=frame))
    except Exception as error:  # decoders raise whatever they like
        raise Unusable(CANT_DECODE, words_of(error, data)) from error


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Return where stored values are no measurement, after ``PixelPaddingValue`` and its range."""
    value = data.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = data.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored >= low) & (stored <= high)


def colours(data: Any, frame: int = 0) -> tuple[np.ndarray, str]:
    """Return uint8 RGB ``[H, W, 3]`` of a frame, and what was done.

    Raises:
        Unusable: it can't be decoded, or its palette can't be applied.
    """
    from pydicom.pixels import apply_color_lut

    stored = decode(data, frame)
    bits, text = int(data.get("BitsStored", stored.dtype.itemsize * 8)), ""
    if str(data.PhotometricInterpretation) == "PALETTE COLOR":
        try:
            with quiet():
                stored = apply_color_lut(stored, data)[..., :3]
        except Exception as error:  # a palette that is damaged in any way
            raise Unusable(NO_PALETTE, words_of(error, data)) from error
        bits, text = stored.dtype.itemsize * 8, "palette"
    if stored.ndim != 3 or stored.shape[-1] != 3:
        raise Unusable(CANT_DECODE, f"colours of shape {stored.shape}")
    if stored.dtype == np.uint8:
        return np.ascontiguousarray(stored), text or "colour as stored"
    high_byte = np.minimum(stored.astype(np.uint32) >> max(0, bits - 8), 255).astype(np.uint8)
    return high_byte, text or f"high byte of {bits} bits"


# --- the file's own look-up tables and windows --------------------------------------------------


def file_scale(data: Any, frame: int = 0, voi: int | str = 0) -> Scale | None:
    """Return the scale of a frame's VOI LUT, or without one of its window; None without either.

    Args:
        data: the data set.
        frame: from 0.
        voi: which of several; an index, or a text of the explanations.

    Raises:
        Unusable: there is none like ``voi``, or it can't be applied.
    """
    table = file_table(data, frame, voi)
    if table is not None:
        return table
    window = file_window(data, frame, voi)
    if window is None:
        return None
    text = f"the file's window W {window.width:g} L {window.center:g}, {window.function}"
    return Scale(window.apply, text)


def file_window(data: Any, frame: int = 0, voi: int | str = 0) -> Window | None:
    """Return a frame's window; see `file_scale`."""
    source = _voi_of(data, frame)
    centers, widths = numbers(source, "WindowCenter"), numbers(source, "WindowWidth")
    if not centers or not widths:
        return None
    explained = source.get("WindowCenterWidthExplanation")
    texts = [] if explained is None else [explained] if isinstance(explained, str) else explained
    index = _index(voi, [*map(str, texts), *[""] * (len(centers) - len(texts))][: len(centers)])
    if index >= len(widths):
        raise Unusable(NO_WINDOW, "fewer widths than centres")
    function: Any = str(source.get("VOILUTFunction") or "LINEAR")
    try:
        return Window(centers[index], widths[index], function)
    except ValueError as error:
        raise Unusable(NO_WINDOW, str(error)) from error


def file_table(data: Any, frame: int = 0, voi: int | str = 0) -> Scale | None:
    """Return a frame's VOI LUT; see `file_scale`."""
    from pydicom.pixels import apply_voi

    source = _voi_of(data, frame)
    if not source.get("VOILUTSequence"):
        return None
    index = _index(voi, [str(item.get("LUTExplanation", "")) for item in source.VOILUTSequence])

    def apply(values: np.ndarray) -> np.ndarray:
        with quiet():
            shown = apply_voi(np.rint(values).astype(np.int64), source, index=index)
            top = 2 ** int(source.VOILUTSequence[index].LUTDescriptor[2]) - 1
        return np.floor(np.clip(shown / top, 0, 1) * 255 + 0.5).astype(np.uint8)

    try:  # once, so that a damaged table is found here and not in the midst of a volume
        apply(np.zeros((1, 1), dtype=np.int16))
    except Exception as error:
        raise Unusable(NO_LUT, type(error).__name__) from error
    return Scale(apply, "the file's VOI LUT")


def _index(voi: int | str, texts: list[str]) -> int:
    if isinstance(voi, int):
        if voi < len(texts):
            return voi
        raise Unusable("no such window in the file", f"index {voi}; there are {len(texts)}")
    folded = [text.strip().casefold() for text in texts]
    if voi.strip().casefold() in folded:
        return folded.index(voi.strip().casefold())
    raise Unusable("no such window in the file", f"{voi!r} is none of {len(texts)}")


def _voi_of(data: Any, frame: int) -> Any:
    return functional_group(data, frame, "FrameVOILUTSequence") or data

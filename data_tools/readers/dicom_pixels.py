"""Stored values of a DICOM image -> 8 bits, in the order of the standard (PS3.4 annex N).

1. decoding (pydicom's decoders, YBR turned into RGB); palettes are looked up;
2. modality LUT or rescale slope and intercept;
3. VOI LUT or window: the file's own, which of several by index or explanation, or what the job says;
4. MONOCHROME1, where the smallest value is white, is turned round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_tools.preprocess.windows import Scale, Window, scale_for
from data_tools.readers.dicom_headers import modality_of, quiet, words_of
from gmai_xtuner.core.errors import Unusable

FileWindow = Literal["file"] | Window
"""As `windows.Window`; ``file`` is the file's own VOI LUT or window, without one ``auto``."""

CANT_DECODE = "pixel data can't be read"
TOO_LARGE = "image is too large"
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


class BadPixels(Unusable):
    """An image whose pixels can't be shown."""


def intensities(data: Any, path: Path, frame: int = 0) -> np.ndarray:
    """``[H, W]`` in the unit of the modality (Hounsfield for CT), padding set to the smallest value.

    Args:
        data: the data set, with pixels.
        path: of its file, for texts.
        frame: from 0.

    Raises:
        BadPixels: it can't be decoded.
    """
    from pydicom.pixels import apply_modality_lut

    stored = decode(data, path, frame)
    try:
        with quiet():
            values = np.asarray(apply_modality_lut(stored, data))
    except (ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
        raise BadPixels(
            "modality transform that can't be applied", words_of(error, data, path)
        ) from error
    if not np.isfinite(values).all():
        raise BadPixels("modality transform that can't be applied", "it gives infinite values")
    padding = _padding(data, stored)
    if padding is not None and padding.any() and not padding.all():
        values = np.where(padding, values[~padding].min(), values)
    return values


def decode(data: Any, path: Path, frame: int = 0) -> np.ndarray:
    """One frame as stored, ``[H, W]`` or RGB ``[H, W, 3]``.

    Raises:
        BadPixels: there are no pixels, they are too few, or no decoder takes them.
    """
    from pydicom.pixels import pixel_array

    if not any(key in data for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise BadPixels("DICOM object without a picture", str(data.get("Modality", ""))[:16])
    try:
        with quiet():
            return np.asarray(pixel_array(data, index=frame))
    except Exception as error:  # decoders raise whatever they like
        raise BadPixels(CANT_DECODE, words_of(error, data, path)) from error


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the stored values are no measurement, after ``PixelPaddingValue`` and its range."""
    value = data.get("PixelPaddingValue")
    if not isinstance(value, int) or stored.ndim != 2:
        return None
    limit = data.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored >= low) & (stored <= high)


def picture(data: Any, path: Path, frame: int, *, window: FileWindow, voi: int | str) -> Any:
    """One frame in 8 bits and what was done.

    Returns:
        uint8 ``[H, W]`` or ``[H, W, 3]``, and the text for ``Sample.preprocessing``.

    Raises:
        BadPixels: see `intensities`; and for a photometric interpretation that is no picture.
    """
    photometric = str(data.get("PhotometricInterpretation", ""))
    if photometric in GREY:
        values = intensities(data, path, frame)
        scale = scale_of(data, values, window=window, voi=voi)
        return _turned(scale, photometric).apply(values), _turned(scale, photometric).text
    if photometric not in COLOUR:
        raise BadPixels("unknown photometric interpretation", photometric[:20])
    stored = decode(data, path, frame)
    if photometric == "PALETTE COLOR":
        return _looked_up(data, stored, path), "palette"
    if stored.ndim != 3 or stored.shape[-1] != 3:
        raise BadPixels(CANT_DECODE, f"{photometric} of shape {stored.shape}")
    if stored.dtype == np.uint8:
        return stored, "colour as stored"
    bits = int(data.get("BitsStored", 16))
    shifted = stored.astype(np.uint32) >> max(0, bits - 8)
    return np.minimum(shifted, 255).astype(np.uint8), f"high byte of {bits} bits"


def _looked_up(data: Any, stored: np.ndarray, path: Path) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    try:
        with quiet():
            colours = apply_color_lut(stored, data)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise BadPixels("palette that can't be applied", words_of(error, data, path)) from error
    if colours.dtype != np.uint8:
        colours = (colours >> 8).astype(np.uint8)
    return np.ascontiguousarray(colours[..., :3])


def scale_of(data: Any, values: np.ndarray, *, window: FileWindow, voi: int | str) -> Scale:
    """The scale that a job's ``window`` means for a grey image.

    Args:
        data: whose VOI LUT or window is taken.
        values: all intensities that ``auto`` and the like look at.
        window: of the job.
        voi: which of the file's; an index, or a text of ``WindowCenterWidthExplanation``.

    Raises:
        BadPixels: the file has windows, but not the one that is wanted, or a wrong one.
    """
    modality = modality_of(str(data.get("Modality", "")))
    if window != "file":
        return scale_for(window, values, modality=modality)
    if data.get("VOILUTSequence"):
        return _lut(
            data, _index(voi, [str(i.get("LUTExplanation", "")) for i in data.VOILUTSequence])
        )
    centers, widths = _listed(data.get("WindowCenter")), _listed(data.get("WindowWidth"))
    if not centers or not widths:
        return scale_for("auto", values, modality=modality)
    explained = data.get("WindowCenterWidthExplanation")
    texts = (
        [] if explained is None else [explained] if isinstance(explained, str) else list(explained)
    )
    number = _index(voi, [*map(str, texts), *[""] * (len(centers) - len(texts))][: len(centers)])
    if number >= len(widths):
        raise BadPixels("window that can't be applied", "fewer widths than centres")
    return _file_window(
        centers[number], widths[number], str(data.get("VOILUTFunction") or "LINEAR")
    )


def _listed(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    values = [value] if isinstance(value, int | float | str) else list(value)
    return [float(item) for item in values]


def _index(voi: int | str, texts: list[str]) -> int:
    if isinstance(voi, int):
        if voi < len(texts):
            return voi
        raise BadPixels("no such window in the file", f"index {voi}; there are {len(texts)}")
    folded = [text.strip().casefold() for text in texts]
    if voi.strip().casefold() in folded:
        return folded.index(voi.strip().casefold())
    raise BadPixels("no such window in the file", f"{voi!r} is none of {len(texts)}")


def _file_window(center: float, width: float, function: str) -> Scale:
    from highdicom.pixels import apply_voi_window

    if not (np.isfinite(center) and np.isfinite(width)) or width < (
        1 if function == "LINEAR" else 1e-9
    ):
        raise BadPixels("window that can't be applied", f"W {width:g} L {center:g}, {function}")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise BadPixels("window that can't be applied", "unknown VOI LUT function")

    def apply(values: np.ndarray) -> np.ndarray:
        shown = apply_voi_window(
            values.astype(np.float64), center, width, function, output_range=(0.0, 255.0)
        )
        return np.floor(shown + 0.5).astype(np.uint8)

    return Scale(apply, f"the file's window W {width:g} L {center:g}, {function}")


def _lut(data: Any, index: int) -> Scale:
    from pydicom.pixels import apply_voi

    def apply(values: np.ndarray) -> np.ndarray:
        try:
            with quiet():
                shown = apply_voi(np.rint(values).astype(np.int64), data, index=index)
                top = 2 ** int(data.VOILUTSequence[index].LUTDescriptor[2]) - 1
        except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            raise BadPixels("VOI LUT that can't be applied", type(error).__name__) from error
        return np.floor(np.clip(shown / top, 0, 1) * 255 + 0.5).astype(np.uint8)

    return Scale(apply, "the file's VOI LUT")


def _turned(scale: Scale, photometric: str) -> Scale:
    if photometric != "MONOCHROME1":
        return scale
    return Scale(
        lambda values: 255 - scale.apply(values), f"{scale.text}, MONOCHROME1 turned round"
    )

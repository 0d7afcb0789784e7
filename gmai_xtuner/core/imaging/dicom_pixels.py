# SPDX-License-Identifier: Apache-2.0

"""Stored values of a DICOM image -> intensities and grey levels, in the standard's order (PS3.4 annex N).

1. decoding (pydicom's decoders; compressed frames in a process of their own, since native decoders abort and
   allocate by what a header claims), YBR turned into RGB; palettes are looked up;
2. modality LUT or rescale slope and intercept, those of the frame's functional groups first;
3. VOI LUT or window, those of the frame's functional groups first;
4. MONOCHROME1, where the smallest value is white, is inverted.

An enhanced object keeps 2 and 3 in its functional groups, for all frames or for each of its own
(PS3.3 C.7.6.16), and has none of them at its top.

Where header and pixels contradict each other (colours, bits, number of bytes), nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging import dicom
from gmai_xtuner.core.imaging.bounded import MEMORY, run_bounded
from gmai_xtuner.core.imaging.dicom import PIXELS, damage_as, functional_group, numbers, quiet
from gmai_xtuner.core.imaging.images import MAX_PIXELS
from gmai_xtuner.core.imaging.windows import IntensityWindow, Window

CANT_DECODE = "pixel data can't be read"
UNKNOWN_COLOURS = "unknown photometric interpretation"
NO_MODALITY_LUT = "modality transform that can't be applied"
NO_WINDOW = "window that can't be applied"
NO_LUT = "VOI LUT that can't be applied"
NO_PALETTE = "palette that can't be applied"
CONTRADICTION = "pixel data that contradict their header"
BAD_PIXELS = (CANT_DECODE, CONTRADICTION, NO_MODALITY_LUT, NO_LUT, NO_PALETTE)

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_OTHER_COLOURS = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB")
"""DICOM's other names; any other text may be what somebody typed, and is not repeated."""


@damage_as(dicom.WRONG_VALUES)
def photometric_of(data: Any) -> str:
    """Return the photometric interpretation, one of `GREY` and `COLOUR`; `Unusable` for another."""
    found = str(data.get("PhotometricInterpretation", ""))
    if found not in GREY + COLOUR:
        raise Unusable(UNKNOWN_COLOURS, found if found in _OTHER_COLOURS else "")
    return found


@damage_as(dicom.WRONG_VALUES)
def has_pixels(data: Any) -> bool:
    """Return True for a data set with pixels of any type."""
    return any(key in data for key in PIXELS)


_ELEMENTS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
_SAFE_FIRST = ("pyjpegls", "pylibjpeg", "pillow", "pydicom", "gdcm")
_YBR = ("YBR_FULL", "YBR_FULL_422")


def decode(data: Any, frame: int = 0) -> np.ndarray:
    """Return one frame as stored, ``[H, W]`` or RGB ``[H, W, 3]``.

    `Unusable` if pixels are missing or too many, contradict the header, or no decoder takes them.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import convert_color_space
    from pydicom.pixels.utils import get_j2k_parameters

    if not has_pixels(data):
        raise Unusable(dicom.NO_PICTURE, dicom.modality_code(data))
    with damage_as(CANT_DECODE, data), quiet():
        if int(data.Rows) * int(data.Columns) > MAX_PIXELS:
            raise Unusable(CANT_DECODE, f"{data.Rows} x {data.Columns} pixels")
        syntax = data.file_meta.TransferSyntaxUID
        if syntax.is_encapsulated:
            offsets = data.get("ExtendedOffsetTable"), data.get("ExtendedOffsetTableLengths")
            extended: Any = offsets if all(offsets) else None
            count = int(data.get("NumberOfFrames") or 1)
            coded = get_frame(
                data.PixelData, frame, number_of_frames=count, extended_offsets=extended
            )
            header = {key: data[key].value for key in _ELEMENTS if key in data}
            signed = get_j2k_parameters(coded).get("is_signed")
            if signed and header.get("PixelRepresentation") == 0:
                raise Unusable(CONTRADICTION, "values with a sign, PixelRepresentation 0")
            samples = int(data.Rows) * int(data.Columns) * int(data.get("SamplesPerPixel") or 1)
            memory = min(MEMORY, 2**28 + 40 * samples)
            stored, space = run_bounded(_decompressed, str(syntax), header, coded, memory=memory)
        else:
            stored, space = _native(data, frame)
        if stored.ndim == 3:
            rgb = convert_color_space(stored, "YBR_FULL", "RGB") if space in _YBR else stored
            _check_colours(stored, space)
            return np.asarray(rgb)
        return np.asarray(stored)


def _decompressed(syntax: str, header: dict[str, Any], coded: bytes) -> tuple[np.ndarray, str]:
    """Return a frame as the first decoder that takes it gives it, and its colour space; in a worker."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.pixels import as_pixel_options, get_decoder
    from pydicom.uid import UID

    data = Dataset()
    for key, value in header.items():
        setattr(data, key, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(syntax)
    data.PixelData = encapsulate([coded])
    decoder, problems = get_decoder(syntax), []
    plugins = [name for name in _SAFE_FIRST if name in decoder.available_plugins]
    for plugin in plugins:
        try:
            with quiet():
                stored, found = decoder.as_array(
                    data, index=0, raw=True, decoding_plugin=plugin, **as_pixel_options(data)
                )
            return stored, str(found["photometric_interpretation"])
        except BaseException as error:  # a panic of Rust is no Exception
            problems.append(f"{plugin}: {type(error).__name__}")
    raise Unusable(CANT_DECODE, ", ".join(problems) or "no decoder for its compression")


def _native(data: Any, frame: int) -> tuple[np.ndarray, str]:
    from pydicom.pixels import as_pixel_options, get_decoder
    from pydicom.pixels.utils import get_expected_length

    (keyword,) = (key for key in PIXELS if key in data)
    excess = len(data[keyword].value) - get_expected_length(data)
    row = int(data.Columns) * int(data.SamplesPerPixel) * int(data.BitsAllocated) // 8
    if excess >= max(2, row):
        raise Unusable(CONTRADICTION, f"{excess} bytes more than its size says")
    allocated, bits = int(data.BitsAllocated), int(data.get("BitsStored") or data.BitsAllocated)
    high = int(data.get("HighBit", bits - 1))
    shifted = keyword == "PixelData" and allocated > 1 and high != bits - 1
    options = as_pixel_options(data)
    if shifted:
        options["correct_unused_bits"] = False
    decoder = get_decoder(data.file_meta.TransferSyntaxUID)
    stored, found = decoder.as_array(data, index=frame, raw=True, **options)
    if shifted:
        # Values lie in the upper bits (overlays of old files in the lower ones), or the header is wrong.
        unsigned = stored.view(f"u{stored.dtype.itemsize}")
        if not bits - 1 <= high < allocated or int(unsigned.max()) < 2**bits:
            raise Unusable(CONTRADICTION, f"HighBit {high} with {bits} bits stored")
        stored = (stored << (allocated - 1 - high)) >> (allocated - bits)
    space = str(found["photometric_interpretation"])
    if stored.ndim == 3 and space in (*_YBR, "RGB") and allocated == 8:
        _check_planes(stored, int(data.get("PlanarConfiguration") or 0))
    return stored, space


def _check_colours(stored: np.ndarray, space: str) -> None:
    """Refuse RGB that is called YBR, and the other way round, which shows by impossible or absent colours."""
    if stored.dtype != np.uint8:
        return
    y, b, r = np.moveaxis(stored[::4, ::4].astype(np.int16), -1, 0)
    if space in _YBR:
        green = y - 0.344 * (b - 128) - 0.714 * (r - 128)
        red, blue = y + 1.402 * (r - 128), y + 1.772 * (b - 128)
        worst = np.max([-green, -red, -blue, green - 255, red - 255, blue - 255], axis=0)
        if (worst > 48).mean() > 0.1:
            raise Unusable(CONTRADICTION, "colours that YBR can't have; they may be RGB")
    elif space == "RGB" and np.ptp(y) > 32:
        no_colour = (np.abs(b - 128) < 8) & (np.abs(r - 128) < 8)
        if no_colour.mean() > 0.8 and (np.abs(y - 128) > 32).mean() > 0.3:
            raise Unusable(CONTRADICTION, "two channels are 128 nearly everywhere; they may be YBR")


def _check_planes(stored: np.ndarray, planar: int) -> None:
    """Refuse colours by pixel that are called colours by plane, and the other way round.

    Read the wrong way an image falls into a third of its size, three times three: neighbours differ more.
    """
    height, width, _ = stored.shape
    if min(height, width) < 16:
        return
    if planar == 1:
        other = np.moveaxis(stored, -1, 0).reshape(height, width, 3)
    else:
        other = np.moveaxis(stored.reshape(3, height, width), 0, -1)
    roughness = [
        np.abs(np.diff(image[::2].astype(np.int16), axis=1)).mean()
        + np.abs(np.diff(image[:, ::2].astype(np.int16), axis=0)).mean()
        for image in (stored, other)
    ]
    if roughness[1] < 0.5 * roughness[0]:
        raise Unusable(CONTRADICTION, f"PlanarConfiguration {planar}; the other one fits")


@damage_as(dicom.WRONG_VALUES)
def intensities(data: Any, frame: int = 0) -> np.ndarray:
    """Return ``[H, W]`` in the unit of the modality (Hounsfield for CT).

    Padding is set to what is shown black: the smallest value, the largest of MONOCHROME1.
    """
    stored = decode(data, frame)
    if stored.ndim != 2:
        raise Unusable(CONTRADICTION, f"grey levels of shape {stored.shape}")
    own = functional_group(data, frame, "PixelValueTransformationSequence")
    with damage_as(NO_MODALITY_LUT, data), quiet():
        if own is None and data.get("ModalityLUTSequence"):
            values = _look_up(data.ModalityLUTSequence[0], data)[0](stored)
        else:
            source = data if own is None else own
            slope, intercept = numbers(source, "RescaleSlope"), numbers(source, "RescaleIntercept")
            if slope[:1] == [0]:
                raise Unusable(NO_MODALITY_LUT, "a slope of 0")
            values = stored
            if slope or intercept:
                values = stored * (slope or [1.0])[0] + (intercept or [0.0])[0]
    if not np.isfinite(values).all():
        raise Unusable(NO_MODALITY_LUT, "it gives infinite values")
    padding = _padding(data, stored)
    if padding is not None and padding.any() and not padding.all():
        white_is_low = photometric_of(data) == "MONOCHROME1"
        black = values[~padding].max() if white_is_low else values[~padding].min()
        values = np.where(padding, black, values)
    return values


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Return where stored values are no measurement, after ``PixelPaddingValue`` and its range."""
    both = (data.get(f"PixelPadding{name}") for name in ("Value", "RangeLimit"))
    ends = [end for end in both if isinstance(end, int)]
    if not ends or "PixelPaddingValue" not in data or stored.dtype.kind == "f":
        return None
    # Written without the sign that the pixels have, 63536 means -2000.
    size = 2 ** int(data.BitsAllocated)
    signed = stored.dtype.kind == "i"
    ends = [end - size if signed and end >= size // 2 else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


@damage_as(dicom.WRONG_VALUES)
def colours(data: Any, frame: int = 0) -> tuple[np.ndarray, str]:
    """Return uint8 RGB ``[H, W, 3]`` of a frame, and what was done."""
    from pydicom.pixels import apply_color_lut

    stored = decode(data, frame)
    bits, text = int(data.get("BitsStored", stored.dtype.itemsize * 8)), ""
    if photometric_of(data) == "PALETTE COLOR":
        with damage_as(NO_PALETTE, data), quiet():
            stored = apply_color_lut(stored, data)[..., :3]
        bits, text = stored.dtype.itemsize * 8, "palette"
    if stored.ndim != 3 or stored.shape[-1] != 3:
        raise Unusable(CONTRADICTION, f"colours of shape {stored.shape}")
    if stored.dtype == np.uint8:
        return np.ascontiguousarray(stored), text or "colour as stored"
    high_byte = np.minimum(stored.astype(np.uint32) >> max(0, bits - 8), 255).astype(np.uint8)
    return high_byte, text or f"high byte of {bits} bits"


@damage_as(dicom.WRONG_VALUES)
def file_intensity_window(data: Any, frame: int = 0, voi: int | str = 0) -> IntensityWindow | None:
    """Return a frame's VOI LUT, or without one its window; None without either.

    ``voi`` says which of several, by index or explanation; `Unusable` if there is none such, or it can't be
    applied.
    """
    if (table := file_table(data, frame, voi)) is not None:
        return table
    if (window := file_window(data, frame, voi)) is None:
        return None
    text = f"the file's window W {window.width:g} L {window.center:g}, {window.function}"
    if _voi_of(data, frame).get("VOILUTSequence"):
        text += ", its VOI LUT can't be applied"
    return IntensityWindow(window.apply, text)


@damage_as(dicom.WRONG_VALUES)
def file_window(data: Any, frame: int = 0, voi: int | str = 0) -> Window | None:
    """Return a frame's window; see `file_intensity_window`.

    ``LINEAR`` has no width below 1 (PS3.3 C.11.2.1.2): such a one is taken for ``LINEAR_EXACT``.
    """
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
    if function == "LINEAR" and 0 < widths[index] < 1:
        function = "LINEAR_EXACT"
    try:
        return Window(centers[index], widths[index], function)
    except ValueError as error:
        raise Unusable(NO_WINDOW, str(error)) from error


@damage_as(dicom.WRONG_VALUES)
def file_table(data: Any, frame: int = 0, voi: int | str = 0) -> IntensityWindow | None:
    """Return a frame's VOI LUT; None too for one that can't be applied beside a window."""
    source = _voi_of(data, frame)
    if not source.get("VOILUTSequence"):
        return None
    index = _index(voi, [str(item.get("LUTExplanation", "")) for item in source.VOILUTSequence])
    try:
        with damage_as(NO_LUT), quiet():
            look_up, table, bits = _look_up(source.VOILUTSequence[index], data)
    except Unusable:
        if numbers(source, "WindowCenter") and numbers(source, "WindowWidth"):
            return None
        raise
    # Tables of 12 bits are called 16 bits by some makers; viewers go by the entries.
    used = min(bits, max(1, int(table.max()).bit_length()))
    top = 2**used - 1

    def apply(values: np.ndarray) -> np.ndarray:
        return np.floor(look_up(values) / top * 255 + 0.5).astype(np.uint8)

    text = "the file's VOI LUT"
    return IntensityWindow(
        apply, text if used == bits else f"{text}, {used} of its {bits} bits used"
    )


def _look_up(item: Any, data: Any) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, int]:
    """Return the function of a look-up table's item (PS3.3 C.11.1.1), its entries, and its bits."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    if not 8 <= bits <= 16:
        raise Unusable(NO_LUT, f"entries of {bits} bits")
    entries = item["LUTData"].value
    if isinstance(entries, bytes):
        little = data.file_meta.TransferSyntaxUID.is_little_endian
        one_byte = bits == 8 and len(entries) < 2 * count
        table = np.frombuffer(entries, "u1" if one_byte else "<u2" if little else ">u2")[:count]
    else:
        table = np.atleast_1d(np.asarray(entries, dtype=np.uint16))
    if len(table) != count or int(table.max()) >= 2**bits:
        raise Unusable(NO_LUT, f"{len(table)} entries, {count} of {bits} bits are declared")
    # The descriptor's second value has the sign of what is looked up, which its type may not show.
    signed = int(data.get("PixelRepresentation") or 0)
    if first >= 2**15 and (signed or min(numbers(data, "RescaleIntercept") or [0]) < 0):
        first -= 2**16

    def look_up(values: np.ndarray) -> np.ndarray:
        places = np.rint(values).astype(np.int64) - first
        return table[np.clip(places, 0, count - 1)]

    return look_up, table, bits


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

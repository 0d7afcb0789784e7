# SPDX-License-Identifier: Apache-2.0

"""RGB image -> pixel values of the vision tower; `core.imaging.images` decodes the file.

Shapes: ``S`` side of the square that the vision tower takes (336), ``3`` channels in RGB order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import read_json, resolve_directory
from gmai_xtuner.core.imaging.images import MAX_PIXELS, ReducedImage, open_reduced, open_rgb

if TYPE_CHECKING:
    import torch

DECODINGS = ("full", "scaled")

_PROCESSOR_FILE = "processor_config.json"
_KEPT = 2
"""Pixels that a JPEG decoded at a fraction keeps for one pixel of the result."""
_ROWS_AT_ONCE = 256
"""Of a tall image, padded to a square's width."""
_LONG = 4
"""Longer edge by shorter edge from which on padding would be most of the work."""


class ImageTransform:
    """RGB image -> normalised pixel values ``[3, S, S]``.

    Mode ``"pad"`` pads to a square with the mean colour, then resizes; its values are bit for bit
    those of xtuner 0.2.0 (``expand2square``, then ``CLIPImageProcessor``). Mode ``"resize"``
    resizes both edges at once, as the paper's sentence says. Both are bicubic.

    Args:
        image_size: ``S`` in pixels.
        mean: mean of red, green, blue in 0..1.
        std: standard deviation of red, green, blue in 0..1.
        mode: ``"pad"`` or ``"resize"``.
        decoding: how :meth:`read` opens a file. ``"full"`` decodes every pixel. ``"scaled"`` decodes a
            large JPEG at 1/2, 1/4 or 1/8, such that its longer edge (mode ``"resize"``: its shorter one)
            keeps at least two pixels for one of the result: from 4 S on. That is several times as fast;
            levels (0..255) of photographs and scans differ by about 0.2 in the mean and 3 at the most,
            those of noise by more, see ``benchmarks/README.md``.

    Raises:
        ValueError: a size, mean, std, mode or decoding that makes no sense.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mode: str = "pad",
        decoding: str = "full",
    ) -> None:
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
            raise ValueError(f"image_size must be a positive number of pixels, got {image_size!r}.")
        if mode not in ("pad", "resize"):
            raise ValueError(f'mode must be "pad" or "resize", got {mode!r}.')
        if decoding not in DECODINGS:
            raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}.")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(
                f"mean and std must have three values, std positive ones, got {mean!r} and {std!r}."
            )
        self.image_size = image_size
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.mode = mode
        self.decoding = decoding
        self.mean_colour = tuple(int(value * 255) for value in self.mean)
        # What a byte becomes, in transformers' order of operations.
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        centre, spread = (np.array(one, np.float32)[:, None] for one in (self.mean, self.std))
        self._table = (levels - centre) / spread

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, mode: str = "pad", decoding: str = "full"
    ) -> ImageTransform:
        """Make the transform that the ``preprocessor_config.json`` of a vision tower describes.

        ``path`` is a model folder, the JSON file itself, or a name on the hub.

        Raises:
            ModelLoadError: the file is missing, or describes what this transform can't do
                (crop that differs from the resize or is not square, other than bicubic, ...).
        """
        file = _find_preprocessor_config(path)
        config = read_json(file)
        if file.name == _PROCESSOR_FILE:
            config = config.get("image_processor") or {}
        size = _square_side(config.get("size"), key="size", file=file)
        if config.get("do_center_crop", True) and config.get("crop_size") is not None:
            crop = _square_side(config["crop_size"], key="crop_size", file=file)
            if crop != size:
                raise ModelLoadError(
                    f"{file}: size {size} and crop_size {crop} differ, so a part of each image "
                    "would be cut off. Make them equal."
                )
        expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise ModelLoadError(f"{file}: {key} must be {value}, got {config[key]!r}.")
        if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ModelLoadError(
                f"{file}: rescale_factor must be 1/255, got {config['rescale_factor']!r}."
            )
        try:
            return cls(
                size, config["image_mean"], config["image_std"], mode=mode, decoding=decoding
            )
        except KeyError as error:
            raise ModelLoadError(f"{file}: {error} is missing.") from error

    def processor(self) -> Any:
        """Return the image processor of transformers whose file says what this transform does."""
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(
            size={"shortest_edge": self.image_size},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=list(self.mean),
            image_std=list(self.std),
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return float32 ``[3, S, S]`` of an RGB image of any size (see :func:`open_rgb`)."""
        if image.mode != "RGB":
            raise ValueError(f"expected an image of mode RGB, got {image.mode}. Use open_rgb().")
        side = self.image_size
        if self.mode == "pad":
            return self._normalised(_pad_and_resize(image, side, colour=self.mean_colour))
        return self._normalised(image.resize((side, side), Image.Resampling.BICUBIC))

    def read(self, path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Return float32 ``[3, S, S]`` of a file, decoded as ``decoding`` says; see :func:`open_rgb`."""
        if self.decoding == "full":
            return self(open_rgb(path, max_pixels=max_pixels))
        longer = _KEPT * self.image_size
        enough = (longer, 1 if self.mode == "pad" else longer)
        reduced = open_reduced(path, enough=enough, max_pixels=max_pixels)
        if reduced.by == 1:
            return self(reduced.image)
        side, (width, height) = self.image_size, reduced.size
        if self.mode == "pad":
            square = _pad_and_resize_reduced(reduced, side, colour=self.mean_colour)
        else:
            box = (0, 0, width / reduced.by, height / reduced.by)
            square = reduced.image.resize((side, side), Image.Resampling.BICUBIC, box=box)
        return self._normalised(square)

    def _normalised(self, square: Image.Image) -> torch.Tensor:
        import torch

        pixels = np.asarray(square)
        values = np.empty((3, self.image_size, self.image_size), dtype=np.float32)
        for channel in range(3):
            # mode="clip" only spares the check of an index that a byte can't miss.
            np.take(self._table[channel], pixels[:, :, channel], out=values[channel], mode="clip")
        return torch.from_numpy(values)


def _pad_and_resize(image: Image.Image, side: int, *, colour: tuple[int, ...]) -> Image.Image:
    """Centre on a square of one colour and resize it bicubically, without building the square.

    Pillow resizes first along rows, then along columns, with bytes in between. The two passes are
    called apart: a wide image is padded between them, a tall one is padded some rows at a time. In a long
    image the pass across the padding is our own, which works on nothing but the image.
    """
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if width == height:
        return image.resize((side, side), bicubic)
    length, is_long = max(width, height), max(width, height) > _LONG * min(width, height)
    square = Image.new("RGB", (side, side if is_long else length), colour)
    if width > height:
        rows = image.resize((side, height), bicubic)
        top = (length - height) // 2
        if is_long:
            top, strip = _resize_padded(np.asarray(rows), length, side, colour=colour)
            rows = Image.fromarray(strip)
        square.paste(rows, (0, top))
    elif is_long:
        columns = np.asarray(image).transpose(1, 0, 2)
        left, strip = _resize_padded(columns, length, side, colour=colour)
        narrow = Image.fromarray(np.ascontiguousarray(strip.transpose(1, 0, 2)))
        square.paste(narrow.resize((strip.shape[0], side), bicubic), (left, 0))
    else:
        for top in range(0, height, _ROWS_AT_ONCE):
            bottom = min(top + _ROWS_AT_ONCE, height)
            rows = Image.new("RGB", (length, bottom - top), colour)
            rows.paste(image.crop((0, top, width, bottom)), ((length - width) // 2, 0))
            square.paste(rows.resize((side, bottom - top), bicubic), (0, top))
    return square if is_long else square.resize((side, side), bicubic)


def _resize_padded(
    pixels: np.ndarray, length: int, side: int, *, colour: tuple[int, ...]
) -> tuple[int, np.ndarray]:
    """Pad axis 0 of uint8 ``[n, m, 3]`` to ``length`` and resize it to ``side`` as Pillow does, bit for bit.

    Returns:
        First row of the result that the image reaches, and those rows, uint8 ``[k, m, 3]``; the others have
        the colour of the padding.
    """
    # libImaging/Resample.c of Pillow: weights in 22 bits, taken from windows of 4 pixels of the result
    n, m = pixels.shape[:2]
    before, scale = (length - n) // 2, length / side
    widening = max(scale, 1.0)
    windows: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    first = side
    for row in range(side):
        centre = (row + 0.5) * scale
        low = max(0, int(centre - 2 * widening + 0.5))
        high = min(length, int(centre + 2 * widening + 0.5))
        inside = (max(low, before), min(high, before + n))
        if inside[0] >= inside[1]:
            continue
        first = min(first, row)
        weights = _bicubic((np.arange(low, high) - centre + 0.5) * (1.0 / widening))
        weights /= np.cumsum(weights)[-1]  # summed in order, as in C
        weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights))
        own = weights[inside[0] - low : inside[1] - low]
        ground = (weights.sum() - own.sum()) * np.array(colour, dtype=np.float64) + 2**21
        windows.append((inside[0] - before, inside[1] - before, own, ground))
    result = np.empty((len(windows), m, 3), dtype=np.uint8)
    block = max(1, 2**22 // n)
    for at in range(0, m, block):
        values = pixels[:, at : at + block].reshape(n, -1).astype(np.float64)
        for number, (low, high, own, ground) in enumerate(windows):
            sums = (own @ values[low:high]).reshape(-1, 3) + ground  # exact: below 2**53
            result[number, at : at + block] = np.floor(sums / 2**22).clip(0, 255)
    return first, result


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _pad_and_resize_reduced(
    reduced: ReducedImage, side: int, *, colour: tuple[int, ...]
) -> Image.Image:
    """Pad and resize an image that was decoded at a fraction of its size.

    The edges of image and square lie where they lie at full size, between two pixels if need be.
    """
    width, height = reduced.size
    if width < height:
        turned = reduced.image.transpose(Image.Transpose.TRANSPOSE)
        square = _pad_and_resize_reduced(
            ReducedImage(turned, (height, width), reduced.by), side, colour=colour
        )
        return square.transpose(Image.Transpose.TRANSPOSE)
    by, image, bicubic = reduced.by, reduced.image, Image.Resampling.BICUBIC
    exact = width / by
    rows = image.resize((side, image.height), bicubic, box=(0, 0, exact, image.height))
    above = ((width - height) // 2) / by
    top = math.ceil(above)
    begin = top - above
    columns = Image.new("RGB", (side, max(math.ceil(begin + exact), top + image.height)), colour)
    columns.paste(rows, (0, top))
    if height % by and width > height:
        # The last row stands for fewer pixels: mix it with the ground.
        last = (0, image.height - 1, side, image.height)
        ground = Image.new("RGB", (side, 1), colour)
        columns.paste(
            Image.blend(ground, rows.crop(last), (height % by) / by), (0, top + image.height - 1)
        )
    return columns.resize((side, side), bicubic, box=(0, begin, side, begin + exact))


def _find_preprocessor_config(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    folder = resolve_directory(str(path), weights=False)
    own = folder / "preprocessor_config.json"
    # transformers 5 writes all processors of a model into one file.
    for file in (own, folder / _PROCESSOR_FILE):
        if file.is_file():
            return file
    raise ModelLoadError(
        f"{own} does not exist. Copy the image processor's file beside the vision tower."
    )


def _square_side(size: Any, *, key: str, file: Path) -> int:
    """Return the side in pixels from a number, ``{"shortest_edge": n}`` or ``{"height": n, "width": n}``."""
    found: Any = size
    if isinstance(size, dict):
        if set(size) == {"shortest_edge"}:
            found = size["shortest_edge"]
        elif set(size) == {"height", "width"} and size["height"] == size["width"]:
            found = size["height"]
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return found
    raise ModelLoadError(
        f"{file}: {key} must be a square (a number of pixels, shortest_edge, or equal height and "
        f"width), got {size!r}."
    )

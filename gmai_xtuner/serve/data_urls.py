"""Images of a request: data URLs -> pictures as in training. Nothing is fetched, no file is opened."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from PIL import Image

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import decode_rgb
from gmai_xtuner.serve.errors import ApiError

_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_VOLUMES = ("dicom", "nifti", "nrrd")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may bring.

    Args:
        body_bytes: the whole request.
        images: of one request, all turns together.
        image_bytes: of one image's file.
        pixels: width x height of one image.
    """

    body_bytes: int = 64 * 2**20
    images: int = 16
    image_bytes: int = 20 * 2**20
    pixels: int = 100_000_000


def picture_of(url: str, param: str, limits: Limits) -> Image.Image:
    """The picture in a data URL.

    Args:
        url: ``data:image/png;base64,...``.
        param: the field, for errors.
        limits: see there.

    Raises:
        ApiError: another address, no base64, no picture, or a too large one.
    """
    found = _DATA_URL.match(url)
    if found is None:
        shown = url[:40] + ("..." if len(url) > 40 else "")
        raise ApiError(
            f"expected a data URL (data:image/png;base64,...), got {shown!r}. This server fetches nothing "
            "and opens no files: send the image itself",
            code="invalid_image_url",
            param=param,
        )
    kind = (found["kind"] or "").lower()
    if any(name in kind for name in _VOLUMES):
        raise ApiError(
            f"{kind} is not an image: choose slice and window, and send a PNG. The corpus builder and the "
            "page (python -m gmai_xtuner.demo) do so",
            code="unsupported_image",
            param=param,
        )
    encoded = url[found.end() :]
    if len(encoded) // 4 * 3 > limits.image_bytes + 2:
        raise ApiError(
            f"the image's file is larger than {limits.image_bytes} bytes, this server's limit",
            status=413,
            code="image_too_large",
            param=param,
        )
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            f"the data URL is not base64: {error}", code="invalid_image_url", param=param
        ) from error
    try:
        return decode_rgb(content, param, max_pixels=limits.pixels)
    except ImageError as error:
        raise ApiError(
            str(error),
            status=413 if error.reason == "enormous_image" else 400,
            code="image_too_large" if error.reason == "enormous_image" else error.reason,
            param=param,
        ) from error

"""The picture as it is attached to a request: the clean one, or a copy with the box drawn in."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.records import Box
from data_tools.writers.options import ImageOptions
from gmai_xtuner.core.errors import CorpusError

# Signature of the file -> its media type. What else the corpus may hold is encoded anew.
AS_IT_IS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
BOX_COLOUR = (255, 0, 0)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to be attached.

    Args:
        path: of the stored file.
        width, height: of the stored file, pixels.
        box: to be drawn into the copy, or None.
        digest: of the file's bytes; two files with the same bytes are the same picture.
    """

    path: Path
    width: int
    height: int
    box: Box | None
    digest: str

    def size(self, options: ImageOptions) -> tuple[int, int]:
        """Width and height as it is sent."""
        scale = min(1.0, options.longest_side / max(self.width, self.height))
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def identity(self, options: ImageOptions) -> dict[str, object]:
        """What the ledger's key says of it, without the bytes as some version of an encoder writes them."""
        described: dict[str, object] = {"sha256": self.digest, "detail": options.detail}
        if self.box is not None:
            described["box"] = list(self.box)
        if self.box is not None or self.size(options) != (self.width, self.height):
            described |= {"size": list(self.size(options)), "quality": options.quality}
        return described

    def url(self, options: ImageOptions) -> str:
        """As a data URL. Reads the file, and encodes it if it's too large or gets a box.

        Raises:
            CorpusError: the file can't be read or isn't the one that was hashed.
        """
        data = read(self.path)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise CorpusError(
                f"{self.path}: the picture changed while the job was running; run it again"
            )
        kind = next((kind for start, kind in AS_IT_IS.items() if data.startswith(start)), None)
        if kind is None or self.box is not None or self.size(options) != (self.width, self.height):
            data, kind = self._encode(data, options)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def _encode(self, data: bytes, options: ImageOptions) -> tuple[bytes, str]:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image = opened.convert("L" if opened.mode in ("1", "L") and not self.box else "RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise CorpusError(f"{self.path}: the stored picture can't be read ({error})") from error
        width, height = self.size(options)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.box is not None:
            x, y = width / self.width, height / self.height
            line = max(2, round(max(width, height) / 256))
            x1, y1, x2, y2 = self.box
            # Around the region, not over its edge: the corners are those of the half-open box.
            corners = (x1 * x - line, y1 * y - line, x2 * x - 1 + line, y2 * y - 1 + line)
            ImageDraw.Draw(image).rectangle(corners, outline=BOX_COLOUR, width=line)
        stream = io.BytesIO()
        if options.quality:
            image.save(stream, "JPEG", quality=options.quality)
            return stream.getvalue(), "image/jpeg"
        image.save(stream, "PNG")
        return stream.getvalue(), "image/png"


def read(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        CorpusError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: the stored picture can't be read ({error})") from error

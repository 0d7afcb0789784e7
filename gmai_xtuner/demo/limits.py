# SPDX-License-Identifier: Apache-2.0

"""Limits of what a visitor may bring, and of what all of them together may keep in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from gmai_xtuner.demo.i18n import PageError

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits beyond which something is refused, with a message, before it costs memory.

    Args:
        upload_bytes: of all files of one upload together.
        pixels: width x height of one image or slice.
        voxels: of a volume, a series, or all frames of a file.
        memory_bytes: opened images of all visitors together.
        images: in one visitor's tray.
        question_characters: of one question.
        waiting: questions in the queue.
    """

    upload_bytes: int = 256 * MEBIBYTE
    pixels: int = 50_000_000
    voxels: int = 300_000_000
    memory_bytes: int = 4096 * MEBIBYTE
    images: int = 12
    question_characters: int = 20_000
    waiting: int = 32

    def check_pixels(self, width: int, height: int) -> None:
        """Raises:
        PageError: more pixels than allowed, or none.
        """
        if width < 1 or height < 1:
            raise PageError("damaged")
        if width * height > self.pixels:
            raise PageError("too_many_pixels", width=width, height=height, limit=f"{self.pixels:,}")

    def check_voxels(self, count: int) -> None:
        """Raises:
        PageError: more voxels than allowed, or none.
        """
        if count < 1:
            raise PageError("damaged")
        if count > self.voxels:
            raise PageError("too_many_voxels", count=f"{count:,}", limit=f"{self.voxels:,}")


class Memory:
    """Counts the bytes of all opened images; safe to use from several threads.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used

    def take(self, count: int) -> None:
        """Count bytes in.

        Raises:
            PageError: they don't fit; nothing is counted then.
        """
        with self._lock:
            if self._used + count > self._limit:
                raise PageError("memory_full")
            self._used += count

    def give_back(self, count: int) -> None:
        """Count bytes out."""
        with self._lock:
            self._used -= count

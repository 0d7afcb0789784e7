# SPDX-License-Identifier: Apache-2.0

"""Frames of ultrasound, endoscopy and surgery videos: mp4, mov, avi, mkv, webm, mpg, wmv and animated GIF.

Which frames: by time, evenly, by scene, or those that a table names. Their labels: of the folder, of the
video's row in a table, or of the rows of that table that name the frame, a time or an interval.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from data_tools.readers import SourceOptions
from data_tools.readers.file_rows import FileRow, RowColumns, units_of
from data_tools.readers.files import file_below
from data_tools.readers.video_frames import Timeline, frames_at, scene_starts, timeline
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts", ".gif")
THUMBNAIL_SIDE = 32  # pixels of the grey thumbnail by which frames are told apart


class VideoColumns(RowColumns):
    """The columns of a table; those of `RowColumns`, and the frame that a row is about.

    ``frame`` is its number from 0 (`first_frame` says otherwise); or ``seconds`` its time, ``83.5`` or
    ``1:23.5``: the frame on the screen then. ``until`` ends the interval that begins there, in the same unit,
    exclusive.
    """

    frame: str | None = None
    seconds: str | None = None
    until: str | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> VideoColumns:
        if self.frame and self.seconds:
            raise ValueError("name the column of the frame's number or that of its time, not both")
        if self.until and not (self.frame or self.seconds):
            raise ValueError("'until' ends an interval that 'frame' or 'seconds' begins: name one")
        return self

    @property
    def of_frames(self) -> bool:
        """Whether a row speaks of a frame or an interval, and not of the video as a whole."""
        return bool(self.frame or self.seconds)


class Options(SourceOptions):
    """Keys of ``reader: video``; docs/corpus.md explains them."""

    native_memory: ClassVar[int] = 2**32

    files: str = "**/*"
    pick: Literal["every", "evenly", "scenes", "table"] = "evenly"
    seconds: float = Field(default=1.0, gt=0)
    count: int = Field(default=8, gt=0)
    scene_change: float = Field(default=0.3, gt=0, lt=1)
    max_frames: int | None = Field(default=None, gt=0)
    skip_start: float = Field(default=0.0, ge=0)
    skip_end: float = Field(default=0.0, ge=0)
    crop: tuple[int, int, int, int] | None = None
    min_difference: float = Field(default=1.0, ge=0)
    table: Path | None = None
    columns: VideoColumns = VideoColumns()
    first_frame: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        if self.pick == "table" and not (self.table and self.columns.of_frames):
            needed = "give 'table', and in 'columns' the column 'frame' or 'seconds'"
            raise ValueError(f"'pick: table' takes the frames that a table names: {needed}")
        if self.pick == "table" and self.columns.until:
            raise ValueError("'until' gives intervals, 'pick: table' single frames: pick 'every'")
        x1, y1, x2, y2 = self.crop or (0, 0, 1, 1)
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise ValueError(f"crop is [x1, y1, x2, y2] with x1 < x2 and y1 < y2, got {self.crop}")
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each video; the payload are its rows of the table, or None without a table."""
    columns = options.columns
    extra = [name for name in (columns.frame, columns.seconds, columns.until) if name]
    yield from units_of(options, SUFFIXES, "video", extra=extra)


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the picked frames of one video."""
    if options.table is not None and unit.payload is None:
        raise Unusable("video of the table not found")
    path = file_below(options, unit.key, "video can't be read")
    line = timeline(path)
    spans: list[_Span] = []
    for row in unit.payload or ():
        # Which frames a row that can't be read was about can't be known: it may be any.
        with drops.annotation(unit.key, *row.lost):
            spans.append(_span(row, options, line))
    if options.table is not None and not spans:
        raise Unusable("video without a row in the table")
    numbers = _picked(options, path, line, spans)
    if not numbers:
        raise Unusable("video without a frame to pick", f"{line.end:.2f} s long")
    seen: list[np.ndarray] = []
    for frame in frames_at(path, line, numbers):
        with drops.image(f"{unit.key} frame {frame.number}"):
            if frame.pixels is None:
                raise Unusable("frame can't be decoded")
            pixels = _cropped(frame.pixels, options.crop)
            if options.pick != "table" and options.min_difference:
                grey, size = Image.fromarray(pixels).convert("L"), (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
                thumbnail = np.asarray(grey.resize(size, Image.Resampling.BOX), dtype=np.float32)
                if any(np.abs(thumbnail - other).mean() < options.min_difference for other in seen):
                    raise Unusable("frame nearly the same as another")
                seen.append(thumbnail)
            notes = {"time": f"{line.seconds[frame.number]:.2f} s"} | frame.notes
            if options.crop:
                notes["crop"] = " ".join(map(str, options.crop))
            yield Sample(
                pixels,
                unit.key,
                _annotations(options, unit.key, spans, frame.number),
                part={"frame": frame.number},
                group=unit.key,
                preprocessing=notes,
            )


_Span = tuple[int, int, FileRow]
"""A row of the table, and the frames that it speaks of: from the first to before the second."""


def _span(row: FileRow, options: Options, line: Timeline) -> _Span:
    """Return the frames of a row of the table; `Unusable` if it can't be read, or names none."""
    columns, where, count = options.columns, f"line {row.line} of the table", len(line.pts)
    if row.problem:
        raise Unusable("row of the table can't be read", f"{where}: {row.problem}")
    if not columns.of_frames:
        return 0, count, row
    texts = [row.cells[name] for name in (columns.frame or columns.seconds, columns.until) if name]
    try:
        if columns.frame:
            numbers = [int(text) - options.first_frame for text in texts]
        else:
            numbers = [_number_at(_seconds(text), line, end=i == 1) for i, text in enumerate(texts)]
    except ValueError as error:
        raise Unusable("row of the table can't be read", f"{where}: {error}") from error
    first = numbers[0]
    end = numbers[1] if columns.until else first + 1
    if not 0 <= first < count:
        detail = f"{where}: {texts[0]}; the video has {count} frames in {line.end:.2f} s"
        raise Unusable("frame of the table outside the video", detail)
    if end <= first:
        raise Unusable("interval of no length", f"{where}: {texts[0]} to {texts[1]}")
    return first, min(end, count), row


def _seconds(text: str) -> float:
    """Return ``83.5``, ``1:23.5`` or ``0:01:23.5`` in seconds."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def _number_at(seconds: float, line: Timeline, *, end: bool) -> int:
    """Return the frame on the screen at a time; for an interval's end, the first that comes at it or later.

    Half a unit of the file's clock is allowed for, because tables round.
    """
    if not np.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    slack = max(float(line.time_base) / 2, 1e-6)
    if end:
        return int(np.searchsorted(line.seconds, seconds - slack))
    if seconds >= line.end + slack:
        return len(line.pts)
    return int(np.searchsorted(line.seconds, seconds + slack)) - 1


def _picked(options: Options, path: Path, line: Timeline, spans: Sequence[_Span]) -> list[int]:
    seconds = line.seconds
    ends = [options.skip_start, line.end - options.skip_end]
    first, end = np.searchsorted(seconds, ends).tolist()
    if options.pick == "table":
        numbers = sorted({first for first, _, _ in spans})
    elif options.pick == "every":
        times = np.arange(options.skip_start, line.end - options.skip_end, options.seconds)
        numbers = sorted(set(np.searchsorted(seconds, times - 1e-6).tolist()))
    elif options.pick == "evenly":
        numbers = _evenly(range(first, end), options.count)
    else:
        starts = [first, *scene_starts(path, line, options.scene_change), end]
        starts = sorted({start for start in starts if first <= start <= end})
        numbers = [(a + b - 1) // 2 for a, b in itertools.pairwise(starts)]
    numbers = [number for number in numbers if first <= number < end]
    return _evenly(numbers, options.max_frames) if options.max_frames else numbers


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of them, each in the middle of its share; all of them if they are fewer."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]


def _annotations(
    options: Options, key: str, spans: Sequence[_Span], number: int
) -> tuple[Annotation, ...]:
    if options.table is None:
        folder = Path(key).parent.name
        return (Annotation(folder),) if folder else ()
    left, top = options.crop[:2] if options.crop else (0, 0)
    found = []
    for row in (row for first, end, row in spans if first <= number < end and row.label):
        x1, y1, x2, y2 = row.box or (0, 0, 0, 0)
        box = (x1 - left, y1 - top, x2 - left, y2 - top) if row.box else None
        found.append(Annotation(row.label, box, attributes=row.attributes))
    return tuple(found)


def _cropped(pixels: np.ndarray, crop: tuple[int, int, int, int] | None) -> np.ndarray:
    if crop is None:
        return pixels
    x1, y1, x2, y2 = crop
    height, width = pixels.shape[:2]
    if x2 > width or y2 > height:
        raise Unusable("crop outside the frame", f"the frame has {width} x {height} pixels")
    return np.ascontiguousarray(pixels[y1:y2, x1:x2])

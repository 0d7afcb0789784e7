# SPDX-License-Identifier: Apache-2.0

"""Which frames a video has, and decoding some of them, by PyAV (the FFmpeg libraries in a wheel).

A frame's number counts frames in the order in which they are shown, from 0; its time is in seconds from the
first frame. Both come from the packets' time stamps, so they hold for variable frame rates as well. Decoding
starts at the key frame before the frame that is wanted; one frame is held at a time.

``H`` and ``W`` are a frame's height and width in pixels as it is shown (a phone's rotation is applied).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from gmai_xtuner.core.errors import Unusable

MAX_PIXELS = 2**26  # of a frame; 8K video has 2**25
# Packets of these don't all have a time stamp; FFmpeg guesses the others, wrongly after a seek.
GUESSED_AFTER_SEEKING = ("mpeg", "mpegts")
SCENE_SIDE = 64  # pixels of the thumbnail by which scenes are told apart


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames of a video in the order in which they are shown.

    ``pts`` are int64 ``[frames]``, strictly ascending, in units of ``time_base`` seconds; at ``keyframes``,
    sorted, decoding can start. ``by_counting``: the file has no usable time stamps; ``pts`` are the frames'
    numbers, and a frame is found by decoding all before it.
    """

    pts: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction
    by_counting: bool = False

    @property
    def seconds(self) -> np.ndarray:
        """float64 ``[frames]``: from the first frame."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    @property
    def end(self) -> float:
        """Seconds from the first frame to the end of the last, taken to last as long as the one before."""
        seconds = self.seconds
        last = float(self.time_base) if len(seconds) < 2 else seconds[-1] - seconds[-2]
        return float(seconds[-1] + last)


@dataclass(frozen=True, slots=True)
class Frame:
    """``pixels``: uint8 ``[H, W, 3]``, None if it could not be decoded; ``notes``: of its geometry."""

    number: int
    pixels: np.ndarray | None
    notes: dict[str, str]


def timeline(path: Path) -> Timeline:
    """Return the packets' time stamps; reads the file once and decodes nothing.

    `Unusable` if it isn't a video, is cut off before its first frame, or its frames are too large.
    """
    with _open(path) as container:
        stream = _stream(container, path)
        pts, keyframes = list[int](), list[int]()
        ascending, usable = True, True
        for packet in _packets(container, stream):
            if not packet.size or packet.is_discard:  # it becomes no frame
                continue
            stamp = packet.pts
            usable = usable and stamp is not None
            ascending = ascending and (stamp is None or not pts or stamp > pts[-1])
            pts.append(-1 if stamp is None else stamp)
            if packet.is_keyframe and stamp is not None:
                keyframes.append(stamp)
        if not pts:
            raise Unusable("video without frames", "no packet of a picture in the file")
        # AVI has no room for the order in which frames are shown: a codec that reorders them there comes
        # with the order of decoding as its time stamps.
        reordered = ascending and bool(stream.codec_context.has_b_frames)
        usable = usable and len(set(pts)) == len(pts) and bool(keyframes) and not reordered
        if usable and stream.time_base is not None:
            stamps = np.sort(np.array(pts, dtype=np.int64))
            starts = np.sort(np.array(keyframes, dtype=np.int64))
            if container.format.name in GUESSED_AFTER_SEEKING:
                starts = stamps[:1]
            return Timeline(stamps, starts, stream.time_base)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            detail = "neither time stamps nor a frame rate in the file"
            raise Unusable("video without times", detail)
        numbers = np.arange(len(pts), dtype=np.int64)
        return Timeline(numbers, numbers[:1], 1 / Fraction(rate), by_counting=True)


def frames_at(path: Path, line: Timeline, numbers: Sequence[int]) -> Iterator[Frame]:
    """Yield the frames of these numbers, ascending and without repetition, in their order.

    A frame that is damaged or missing in the stream comes without pixels; the others still come.
    """
    with _open(path) as container:
        stream = _stream(container, path)
        position = -1  # pts of the frame decoded last
        decoded = iter(_decode(container, stream, line))
        for number in numbers:
            target = int(line.pts[number])
            start = int(np.searchsorted(line.keyframes, target, side="right")) - 1
            if not line.by_counting and start > 0 and int(line.keyframes[start]) > position:
                decoded = _seek(container, stream, line, start, target)
            found = None
            for stamp, frame in decoded:
                position = stamp
                if stamp >= target:
                    found = frame if stamp == target else None
                    break
            if found is None or found.is_corrupt:
                yield Frame(number, None, {})
                if position > target:  # the frame just decoded may be the next one that is wanted
                    decoded = _seek(container, stream, line, max(start, 0), target)
                continue
            rgb = np.rot90(found.to_ndarray(format="rgb24"), _turns(found))
            yield Frame(number, np.ascontiguousarray(rgb), _notes(found, stream))


def scene_starts(path: Path, line: Timeline, threshold: float) -> list[int]:
    """Return the frames at which a scene begins, 0 among them; decodes every frame, small.

    The score is that of FFmpeg's ``select`` filter (libavfilter/f_select.c, ``get_scene_score``): the mean
    absolute difference to the frame before, or its change if that is smaller, of 100; here of grey
    thumbnails. So a steady pan is no change of scene, and a cut is one.
    """
    starts, before, before_difference = [0], None, 0.0
    with _open(path) as container:
        for stamp, frame in _decode(container, _stream(container, path), line):
            small = frame.reformat(width=SCENE_SIDE, height=SCENE_SIDE, format="gray").to_ndarray()
            grey = small.astype(np.float32)
            difference = float(np.abs(grey - (grey if before is None else before)).mean()) / 2.56
            score = min(difference, abs(difference - before_difference)) / 100.0
            number = int(np.searchsorted(line.pts, stamp))
            if score > threshold and starts[-1] < number < len(line.pts):
                starts.append(number)
            before, before_difference = grey, difference
    return starts


def _open(path: Path) -> Any:
    try:
        return av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        # FFmpeg's own words, without the path that it repeats.
        text = str(getattr(error, "strerror", None) or error)
        raise Unusable("video can't be read", text or type(error).__name__) from error


def _stream(container: Any, path: Path) -> Any:
    """Return the first stream of moving images; one thread, because every video has its own process."""
    streams = [s for s in container.streams.video if s.codec_context is not None]
    if not streams:
        raise Unusable("video without frames", f"no stream of pictures in {path.name}")
    stream = streams[0]
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise Unusable("image is too large", f"{context.width} x {context.height} pixels")
    context.thread_count = 1
    return stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield packets; a file that is cut off ends where it was cut."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        yield packet


def _decode(container: Any, stream: Any, line: Timeline) -> Iterator[tuple[int, Any]]:
    """Yield ``(pts, frame)`` from where the container stands; a damaged packet costs its own frames only."""
    count = 0
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        for frame in frames:
            if line.by_counting:
                yield count, frame
                count += 1
            elif frame.pts is not None:
                yield frame.pts, frame


def _seek(
    container: Any, stream: Any, line: Timeline, start: int, target: int
) -> Iterator[tuple[int, Any]]:
    """Frames from a key frame at or before ``target``; an earlier one where the file leads too far."""
    while True:
        container.seek(int(line.keyframes[start]), stream=stream, backward=True, any_frame=False)
        decoded = _decode(container, stream, line)
        first = next(decoded, None)
        if first is not None and (first[0] <= target or start == 0):
            return itertools.chain([first], decoded)
        if start == 0:
            return decoded
        start -= 1


def _turns(frame: Any) -> int:
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _notes(frame: Any, stream: Any) -> dict[str, str]:
    """What is particular to the geometry, for the provenance."""
    notes = {}
    if turns := _turns(frame):
        notes["rotated"] = f"{90 * turns} degrees counterclockwise"
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        notes["pixel aspect"] = f"{aspect.numerator}:{aspect.denominator}"
    if frame.interlaced_frame:
        notes["interlaced"] = "yes"
    return notes

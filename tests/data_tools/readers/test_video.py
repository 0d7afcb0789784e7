# SPDX-License-Identifier: Apache-2.0

"""Videos are written here; frame ``n`` shows the bits of ``n`` as eight blocks, black or white."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_tools.readers import video, video_frames
from data_tools.records import Drop, Sample
from tests.data_tools.readers.sets import read_units

WIDTH, HEIGHT = 128, 96


def picture(number: int) -> np.ndarray:
    """uint8 ``[96, 128, 3]``: bit ``i`` of the number is the block from column ``16 * i`` on."""
    bits = [(number >> i) & 1 for i in range(8)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 200 + 20, WIDTH // 8)
    return np.repeat(np.broadcast_to(row, (HEIGHT, WIDTH))[:, :, None], 3, axis=2)


def number_in(pixels: np.ndarray) -> int:
    """The inverse of `picture`, for a picture that a codec has been at."""
    middle = pixels[pixels.shape[0] // 2, 8::16, 0]
    return sum(1 << i for i, value in enumerate(middle) if value > 120)


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    stamps: Sequence[int] | None = None,
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    **settings: Any,
) -> Path:
    """Ten frames a second, a key frame every twelve; ``stamps`` in tenths of a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = pictures[0].shape[1], pictures[0].shape[0]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 10)
        if codec != "gif":
            stream.codec_context.gop_size = 12
        for key, value in settings.items():
            setattr(stream.codec_context, key, value)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = stamps[i] if stamps else i
            frame.time_base = Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def options(root: Path, **keys: Any) -> video.Options:
    base = {"name": "clips", "root": root, "licence": "CC0", "reader": "video"}
    return video.Options.model_validate(base | keys)


def read(root: Path, **keys: Any) -> tuple[list[Sample], list[Drop]]:
    samples, drops, _ = read_units(video, options(root, **keys))
    return samples, drops


BOX = {"box": {key: key for key in ("x1", "y1", "x2", "y2")}}


def frames(samples: Sequence[Sample]) -> list[int]:
    return [int(sample.part["frame"]) for sample in samples]


CODECS = [
    ("mp4", {"codec": "libx264"}),
    ("mp4", {"codec": "mpeg4", "max_b_frames": 2}),
    ("avi", {"codec": "mpeg4", "max_b_frames": 2}),
    ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    ("avi", {"codec": "libx264"}),  # time stamps there are the order of decoding
    ("mkv", {"codec": "libx264"}),
    ("mpg", {"codec": "mpeg2video", "pixel_format": "yuv420p", "max_b_frames": 2}),
]


@pytest.mark.parametrize(("suffix", "how"), CODECS)
def test_every_frame_that_is_asked_for_is_that_frame(tmp_path, suffix, how):
    path = write_video(tmp_path / f"a.{suffix}", [picture(n) for n in range(50)], **how)
    line = video_frames.timeline(path)
    assert len(line.pts) == 50
    assert line.by_counting == ((suffix, how["codec"]) == ("avi", "libx264"))
    for numbers in ([0, 1, 2], [3, 13, 14, 40], [49], list(range(50))):
        found = list(video_frames.frames_at(path, line, numbers))
        assert [frame.number for frame in found] == numbers
        assert [number_in(frame.pixels) for frame in found] == numbers


def test_a_late_frame_is_found_without_decoding_those_before(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [picture(n) for n in range(200)])
    line = video_frames.timeline(path)
    decoded = []
    plain = video_frames._decode

    def counting(*arguments: Any) -> Any:
        for stamp, frame in plain(*arguments):
            decoded.append(stamp)
            yield stamp, frame

    monkeypatch.setattr(video_frames, "_decode", counting)
    (found,) = video_frames.frames_at(path, line, [190])
    assert number_in(found.pixels) == 190
    assert len(decoded) <= 25  # a key frame every twelve


def test_evenly_takes_the_middle_of_each_share(tmp_path):
    write_video(tmp_path / "polyp/a.mp4", [picture(n) for n in range(40)])
    samples, drops = read(tmp_path, pick="evenly", count=4)
    assert frames(samples) == [5, 15, 25, 35]
    assert [number_in(sample.image) for sample in samples] == [5, 15, 25, 35]
    assert not drops
    assert {sample.annotations[0].label for sample in samples} == {"polyp"}
    assert {sample.group for sample in samples} == {"polyp/a.mp4"}
    assert samples[1].preprocessing["time"] == "1.50 s"


def test_every_second_at_a_variable_frame_rate_goes_by_time(tmp_path):
    # Tenths of a second: ten frames in the first second, then one a second.
    stamps = [*range(10), 10, 20, 30, 40, 50]
    write_video(tmp_path / "a.mkv", [picture(n) for n in range(15)], stamps=stamps)
    samples, _ = read(tmp_path, pick="every", seconds=2.0)
    assert frames(samples) == [0, 11, 13]  # at 0, 2 and 4 s
    assert [number_in(sample.image) for sample in samples] == [0, 11, 13]


def test_both_ends_can_be_skipped_and_frames_limited(tmp_path):
    write_video(tmp_path / "a.mp4", [picture(n) for n in range(50)])
    samples, _ = read(tmp_path, pick="every", seconds=0.5, skip_start=1.0, skip_end=1.0)
    assert frames(samples) == [10, 15, 20, 25, 30, 35]
    samples, _ = read(tmp_path, pick="every", seconds=0.5, max_frames=2)
    assert frames(samples) == [10, 35]  # of 0, 5 .. 45: the third and the eighth


def test_scenes_are_seen_by_their_middle_frame(tmp_path):
    scenes = [picture(0)] * 20 + [picture(255)] * 10 + [picture(0b10101010)] * 30
    write_video(tmp_path / "a.mp4", scenes)
    samples, drops = read(tmp_path, pick="scenes")
    assert frames(samples) == [9, 24, 44]
    assert not drops


def test_a_frozen_picture_is_taken_once_and_the_rest_counted(tmp_path):
    write_video(tmp_path / "a.mp4", [picture(3)] * 30 + [picture(7)] * 10)
    samples, drops = read(tmp_path, pick="evenly", count=8)
    assert frames(samples) == [2, 32]
    assert [drop.reason for drop in drops] == ["frame nearly the same as another"] * 6
    samples, drops = read(tmp_path, pick="evenly", count=8, min_difference=0)
    assert len(samples) == 8
    assert not drops


@pytest.fixture
def clip(tmp_path: Path) -> Callable[[str], Path]:
    """Writes ``clips/a.mp4`` of 50 frames and a table; gives the folder of the clips."""
    write_video(tmp_path / "clips/a.mp4", [picture(n) for n in range(50)])

    def make(table: str) -> Path:
        (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
        return tmp_path / "clips"

    return make


def test_the_table_names_frames_with_labels_and_boxes(clip):
    root = clip(
        "video,frame,finding,x1,y1,x2,y2,grade\n"
        "a.mp4,7,polyp,10,20,30,40,0-IIa\na.mp4,7,forceps,1,2,3,4,\n"
        "a,33,normal,,,,,\n"
        "a.mp4,50,polyp,1,2,3,4,\na.mp4,8,polyp,1,two,3,4,\n"
        "b.mp4,1,polyp,1,2,3,4,\n"
    )
    columns = {
        "file": "video", "label": "finding", "frame": "frame",
        **BOX, "attributes": {"grade": "Paris class"},
    }  # fmt: skip
    keys = {"pick": "table", "table": root.parent / "labels.csv", "columns": columns}
    samples, drops, lacking = read_units(video, options(root, **keys))
    assert frames(samples) == [7, 33]
    first, second = samples
    assert number_in(first.image) == 7
    assert [(a.label, a.box) for a in first.annotations] == [
        ("polyp", (10, 20, 30, 40)),
        ("forceps", (1, 2, 3, 4)),
    ]
    assert first.annotations[0].attributes == {"Paris class": "0-IIa"}
    assert lacking == [("polyp",)] * 2  # of the rows that can't be read
    assert [(a.label, a.box) for a in second.annotations] == [("normal", None)]
    assert sorted(drop.reason for drop in drops) == [
        "frame of the table outside the video",
        "row of the table can't be read",
        "video of the table not found",
    ]
    samples, _ = read(root, **keys, first_frame=1)
    assert frames(samples) == [6, 32, 49]


def test_times_of_the_table_are_the_frame_on_the_screen(clip):
    root = clip("file,at,label\na,0:01.25,polyp\na,1.2,polyp\na,4.99,polyp\na,5.1,polyp\n")
    samples, drops = read(
        root, pick="table", table=root.parent / "labels.csv", columns={"seconds": "at"}
    )
    assert frames(samples) == [12, 49]  # a tenth of a second each; 1.2 and 1.25 are one frame
    assert [drop.reason for drop in drops] == ["frame of the table outside the video"]


def test_intervals_label_the_frames_that_are_picked(clip):
    root = clip("file,from,to,phase\na,0,2,preparation\na,2,4,dissection\na,3,3,nothing\n")
    columns = {"label": "phase", "seconds": "from", "until": "to"}
    samples, drops = read(
        root, pick="every", seconds=1.0, table=root.parent / "labels.csv", columns=columns
    )
    assert frames(samples) == [0, 10, 20, 30, 40]
    assert [[a.label for a in sample.annotations] for sample in samples] == [
        ["preparation"], ["preparation"], ["dissection"], ["dissection"], [],
    ]  # fmt: skip
    assert [drop.reason for drop in drops] == ["interval of no length"]


def test_a_crop_takes_the_edge_away_and_boxes_move_along(clip):
    root = clip("file,frame,label,x1,y1,x2,y2\na,7,polyp,40,50,60,70\n")
    columns = {"frame": "frame", **BOX}
    keys = {"pick": "table", "table": root.parent / "labels.csv", "columns": columns}
    (plain,), _ = read(root, **keys)
    (sample,), _ = read(root, **keys, crop=[16, 32, 128, 96])
    assert np.array_equal(sample.image, plain.image[32:96, 16:128])
    assert sample.annotations[0].box == (24, 18, 44, 38)
    assert sample.preprocessing["crop"] == "16 32 128 96"
    samples, drops = read(root, **keys, crop=[16, 32, 129, 96])
    assert not samples
    assert [drop.reason for drop in drops] == ["crop outside the frame"]


def test_a_phone_video_is_upright(tmp_path):
    write_video(tmp_path / "a.mp4", [picture(5)] * 12, rotation=90)
    (sample,), _ = read(tmp_path, count=1)
    pixels = sample.image
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    assert "counterclockwise" in sample.preprocessing["rotated"]
    # 90 degrees counterclockwise: the right edge (bit 7, black) comes to the top.
    assert number_in(np.rot90(pixels, -1)) == 5


def test_an_animated_gif_is_a_video(tmp_path):
    from PIL import Image

    pictures = [Image.fromarray(picture(n)) for n in (1, 2, 4, 8)]
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200, disposal=2
    )
    samples, _ = read(tmp_path, pick="every", seconds=0.4)
    assert [number_in(sample.image) for sample in samples] == [1, 4]


def test_broken_videos_are_counted_and_the_others_come(tmp_path):
    good = write_video(tmp_path / "b.mp4", [picture(n) for n in range(30)])
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "d.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with av.open(str(tmp_path / "e.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 2048), dtype=np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    samples, drops = read(tmp_path, count=3)
    assert {sample.source_file for sample in samples} == {"b.mp4"}
    assert [(drop.where, drop.reason) for drop in drops] == [
        ("a.mp4", "video can't be read"),
        ("c.mp4", "video can't be read"),
        ("d.mp4", "video can't be read"),
        ("e.mp4", "video without frames"),
    ]


def test_damage_in_the_middle_costs_only_the_frames_there(tmp_path):
    path = write_video(
        tmp_path / "a.avi", [picture(n) for n in range(40)], codec="mjpeg", pixel_format="yuvj420p"
    )
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    position, size = packets[20]
    data[position + 8 : position + 8 + size] = bytes(size)
    path.write_bytes(data)
    samples, drops = read(tmp_path, pick="every", seconds=1.0)
    assert frames(samples) == [0, 10, 30]
    assert [number_in(sample.image) for sample in samples] == [0, 10, 30]
    assert [(drop.reason, drop.where) for drop in drops] == [
        ("frame can't be decoded", "a.avi frame 20")
    ]

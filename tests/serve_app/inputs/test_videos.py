"""Tests that an input video is checked by its tables and first frame; the rest is not decoded."""

import struct
import time
from io import BytesIO

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from deployments.request import MediaSize
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.inputs.videos import blank_video, validate_video
from tests.pictures import video

LIMITS = LimitsConfig(max_video_bytes=2**20, max_image_pixels=640 * 480, max_num_frames=17)


def validate(data: bytes) -> tuple[MediaSize, int | None]:
    return validate_video(data, "input_reference", LIMITS)


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("libx264", "mp4"),
        ("libx264", "mov"),
        ("libx265", "mp4"),
        ("libsvtav1", "mp4"),
        ("libvpx", "webm"),
        ("libvpx-vp9", "webm"),
        ("libx264", "matroska"),
    ],
)
def test_size_frames_and_rate_are_told_of_what_people_have(codec: str, container: str) -> None:
    assert validate(video(9, fps=24, codec=codec, container=container)) == (MediaSize(96, 64, 9), 24)


def test_a_video_is_as_large_as_it_is_shown() -> None:
    assert validate(video(turned=90))[0] == MediaSize(64, 96, 9)


def test_of_a_long_video_no_more_frames_are_counted_than_may_be_used() -> None:
    assert validate(video(40))[0].num_frames == 18


def test_a_blank_video_has_as_many_frames_as_are_asked_for() -> None:
    assert validate(blank_video(13)) == (MediaSize(32, 32, 13), 120)


def box(kind: bytes, *content: bytes) -> bytes:
    """Returns a box of an MP4 file."""
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def endless() -> bytes:
    """A video whose tables claim 2**30 frames of one byte each, in one chunk."""
    data = video()
    sizes, chunks = data.index(b"stsz"), data.index(b"stsc")
    data = data[: sizes + 8] + struct.pack(">II", 1, 2**30) + data[sizes + 16 :]
    times = data.index(b"stts")
    data = data[: times + 12] + struct.pack(">I", 2**30) + data[times + 16 :]
    return data[: chunks + 16] + struct.pack(">I", 2**30) + data[chunks + 20 :]


def larger_than_it_says() -> bytes:
    """A video of 16x16 by its container, and of 1024x768 by its first frame."""
    data = video(2, (1024, 768))
    entry = data.index(b"avc1", data.index(b"stsd"))
    return data[: entry + 28] + struct.pack(">HH", 16, 16) + data[entry + 32 :]


def sound() -> bytes:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as made:
        stream = made.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        made.mux(stream.encode(silence))
        made.mux(stream.encode())
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, kind)
    return file.getvalue()


HOSTILE = {
    "long": (video() + bytes(2**20), r"it has \d+ bytes; the limit is 1048576$"),
    "large": (video(1, (1024, 768)), "it has 1024x768, 786432 pixels; the limit is 307200 pixels a frame"),
    "small": (video(2, (8, 64)), "it has 8x64 pixels; the minimum is 16 each way"),
    "larger than it says": (larger_than_it_says(), "it "),
    "endless": (endless(), "it "),
    "sound": (sound(), "it contains no video"),
    "codec": (video(codec="mpeg4"), "it is encoded as mpeg4; accepted: h264, hevc, vp8, vp9, av1"),
    "cut": (video()[:3000], "it cannot be read .*: send a complete MP4 or WebM"),
    "cut webm": (video(codec="libvpx-vp9", container="webm")[:700], "it has no frame that can be decoded: send"),
    "header": (box(b"ftyp", b"isom\0\0\2\0isommp42"), "it "),
    "header of a webm": (b"\x1aE\xdf\xa3" + bytes(60), "it "),
    "noise": (box(b"ftyp", b"isom\0\0\2\0") + bytes(range(256)) * 64, "it "),
    "reference to a file": (box(b"ftyp", b"qt  \0\0\2\0") + box(b"moov", box(b"rmra", bytes(40))), "it "),
}


@pytest.mark.parametrize(("data", "told"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_to_be_opened_is_refused_with_the_reason(data: bytes, told: str) -> None:
    with pytest.raises(BadRequest, match=f"^input_reference: {told}") as refused:
        validate(data)
    assert refused.value.param == "input_reference"
    assert len(refused.value.message) < 250


def test_what_a_file_makes_its_reader_ask_for_is_not_taken_here() -> None:
    own = psutil.Process()
    before, began = own.memory_info().rss, time.monotonic()
    with pytest.raises(BadRequest):
        validate(endless())
    assert own.memory_info().rss - before < 64 * 2**20
    assert time.monotonic() - began < 60

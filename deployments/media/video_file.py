"""Reads an input video: facts about it, and its frames.

    python -m deployments.media.video_file validate MAX_PIXELS MAX_FRAMES < FILE     prints one line of JSON
    python -m deployments.media.video_file blank NUM_FRAMES > FILE                makes a small grey one

A file that has not been checked is read in a process of its own with limited memory and CPU time, because the
tables in a video file can make a reader allocate any amount of memory.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import av
from PIL import Image

from deployments.media.video_format import MP4, find_format

CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
WHOLE = "send a complete MP4 or WebM"
MAX_FPS = 120
LEAST_SIDE = 16
MAX_MEMORY_BYTES, MAX_CPU_S = 2**30, 20
_MARGIN = 128
"""Pixels in each direction by which decoded frames may exceed displayed ones, because codecs work in blocks."""


@dataclass(frozen=True)
class VideoFacts:
    """Facts about a video as it is displayed, after rotation."""

    width: int
    height: int
    num_frames: int
    """At most one more than the `max_frames` that it was counted up to."""
    fps: int | None
    """Rounded, from 1 to MAX_FPS; None if the file does not say."""


def read_facts(data: bytes, max_pixels: int, max_frames: int) -> VideoFacts:
    """Reads a video's facts; decodes only the first frame. Raises ValueError, MemoryError or av.FFmpegError."""
    with _opened(data) as (container, stream):
        width, height = stream.width, stream.height
        if width * height > max_pixels:
            raise ValueError(
                f"has {width}x{height}, {width * height} pixels; the limit is {max_pixels} pixels a frame"
            )
        num_frames = 0
        for packet in container.demux(stream):
            num_frames += bool(packet.size) and not packet.is_discard
            if num_frames > max_frames:
                break
        rate = stream.average_rate or stream.guessed_rate
    first = next(read_frames(data), None)
    if first is None:
        raise ValueError(f"has no frame that can be decoded: {WHOLE}")
    if min(first.size) < LEAST_SIDE:
        raise ValueError(f"has {first.width}x{first.height} pixels; the minimum is {LEAST_SIDE} each way")
    return VideoFacts(*first.size, num_frames, min(MAX_FPS, max(1, round(rate))) if rate else None)


def read_frames(data: bytes) -> Iterator[Image.Image]:
    """Yields the frames in RGB as they are displayed. Raises ValueError or av.FFmpegError."""
    with _opened(data) as (container, stream):
        for frame in container.decode(stream):
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """Yields the container and its first video stream.

    The decoder runs in one thread and refuses frames that are larger than the file says.
    """
    # An empty whitelist keeps libavformat from decoding the first frames by itself.
    with av.open(
        BytesIO(data), format=find_format(data), container_options={"codec_whitelist": "none"}
    ) as container:
        if not container.streams.video:
            raise ValueError("contains no video")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.codec.canonical_name not in CODECS:
            name = "something unknown" if codec is None else codec.codec.canonical_name
            raise ValueError(f"is encoded as {name}; accepted: {', '.join(CODECS)}")
        codec.thread_count = 1
        codec.options = {"max_pixels": str((stream.width + _MARGIN) * (stream.height + _MARGIN))}
        yield container, stream


def _write_blank(num_frames: int) -> bytes:
    file = BytesIO()
    with av.open(file, "w", format=MP4) as container:
        stream: Any = container.add_stream("libx264", rate=MAX_FPS)
        stream.width = stream.height = 2 * LEAST_SIDE
        stream.pix_fmt = "yuv420p"
        grey = av.VideoFrame.from_image(Image.new("RGB", (stream.width, stream.height), "grey"))
        for i in range(num_frames):
            grey.pts = i
            container.mux(stream.encode(grey))
        container.mux(stream.encode())
    return file.getvalue()


def _validate(max_pixels: int, max_frames: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    try:
        print(json.dumps(asdict(read_facts(sys.stdin.buffer.read(), max_pixels, max_frames))))
    except av.FFmpegError as error:
        sys.exit(f"cannot be read ({error.strerror}): {WHOLE}")
    except MemoryError:
        sys.exit(f"cannot be read with {MAX_MEMORY_BYTES >> 20} MiB of memory")
    except ValueError as error:
        sys.exit(str(error))
    except Exception as error:  # PyAV raises other errors on some broken files
        sys.exit(f"cannot be read ({type(error).__name__}): {WHOLE}")


if __name__ == "__main__":
    if sys.argv[1] == "blank":
        sys.stdout.buffer.write(_write_blank(int(sys.argv[2])))
    else:
        _validate(int(sys.argv[2]), int(sys.argv[3]))

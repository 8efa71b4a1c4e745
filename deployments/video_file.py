"""A video that goes in: what its file says of it, and its frames.

    python -m deployments.video_file judge MAX_PIXELS MAX_FRAMES < FILE     prints one line of JSON
    python -m deployments.video_file blank NUM_FRAMES > FILE                makes a small grey one

In a process of its own, which may have so much memory and time and no more, where nobody has judged the file yet:
what the tables of a video say can make whoever reads them ask for any amount.
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

from deployments.video_format import MP4, find_format

CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
WHOLE = "send an MP4 or WebM that is whole"
MAX_FPS = 120
LEAST_SIDE = 16
MAX_MEMORY_BYTES, MAX_CPU_S = 2**30, 20
_MARGIN = 128
"""Pixels each way by which what is decoded may be larger than what is shown: codecs work in blocks."""


@dataclass(frozen=True)
class VideoFacts:
    """As it is shown, turned by its rotation."""

    width: int
    height: int
    num_frames: int
    """At most one more than what was asked about."""
    fps: int | None
    """Rounded; 1 at least, and MAX_FPS at most; None: it does not say."""


def read_facts(data: bytes, max_pixels: int, max_frames: int) -> VideoFacts:
    """Decodes the first frame and no other. Raises ValueError, MemoryError or av.FFmpegError."""
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
        raise ValueError(f"has {first.width}x{first.height} pixels; the least is {LEAST_SIDE} each way")
    return VideoFacts(*first.size, num_frames, min(MAX_FPS, max(1, round(rate))) if rate else None)


def read_frames(data: bytes) -> Iterator[Image.Image]:
    """RGB, one at a time, as they are shown. Raises ValueError or av.FFmpegError."""
    with _opened(data) as (container, stream):
        for frame in container.decode(stream):
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its first video. Its decoder, one thread, takes no larger frames than the file says."""
    # No decoder runs before it is asked for: by itself libavformat would have the first frames decoded.
    with av.open(
        BytesIO(data), format=find_format(data), container_options={"codec_whitelist": "none"}
    ) as container:
        if not container.streams.video:
            raise ValueError("has no video in it")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.codec.canonical_name not in CODECS:
            name = "something unknown" if codec is None else codec.codec.canonical_name
            raise ValueError(f"is coded as {name}; taken: {', '.join(CODECS)}")
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


def _judge(max_pixels: int, max_frames: int) -> None:
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
    except Exception as error:  # PyAV's, of files that nobody thought of
        sys.exit(f"cannot be read ({type(error).__name__}): {WHOLE}")


if __name__ == "__main__":
    if sys.argv[1] == "blank":
        sys.stdout.buffer.write(_write_blank(int(sys.argv[2])))
    else:
        _judge(int(sys.argv[2]), int(sys.argv[3]))

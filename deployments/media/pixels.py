"""Encodes pixels as image and video files, in memory."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from deployments.request import OutputFormat

Frames = npt.NDArray[np.uint8]
"""[F, H, W, 3], RGB."""


@dataclass(frozen=True)
class Sound:
    """The sound of a video."""

    samples: npt.NDArray[np.float32]
    """[channels, samples], from -1 to 1."""
    rate: int
    """Samples per second."""


MEDIA_TYPES: dict[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
}


def encode_media(
    frames: Frames, output_format: OutputFormat, *, compression: int, fps: int, sound: Sound | None = None
) -> bytes:
    """Returns an image file of the first frame, or an MP4 of all frames with the sound.

    compression: quality of JPEG and WebP from 0 to 100; at 100 WebP is lossless.
    """
    if output_format == "mp4":
        return _encode_mp4(frames, fps, sound)
    options = {
        "png": {"compress_level": 1},  # level 6 takes four times as long and saves a tenth
        "jpeg": {"quality": compression},
        "webp": {"quality": compression, "lossless": compression == 100, "method": 2},
    }[output_format]
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, output_format, **options)
    return file.getvalue()


X264_OPTIONS = {"crf": "18", "x264-params": "mbtree=0"}
"""Constant quality, visually lossless. mbtree is off, because with it the file depends on the contents of memory:
the same frames gave different files (seen from 64x64 to 480x832 with libavcodec 62.28)."""


SOUND_BITS_PER_S = 96_000
"""Bit rate of AAC per channel."""


def _encode_mp4(frames: Frames, fps: int, sound: Sound | None) -> bytes:
    """Encodes H.264, and AAC if there is sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=X264_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if sound is not None:
            _mux_sound(container, sound)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _mux_sound(container: av.container.OutputContainer, sound: Sound) -> None:
    """Adds the sound as a stream of its own, which the container interleaves with the frames."""
    samples = np.ascontiguousarray(sound.samples.clip(-1, 1))
    layout = "mono" if len(samples) == 1 else "stereo"
    stream = container.add_stream("aac", rate=sound.rate, layout=layout)
    stream.bit_rate = SOUND_BITS_PER_S * len(samples)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
    frame.sample_rate = sound.rate
    # Without a timestamp the sound would be late by the samples that AAC puts before it.
    frame.pts, frame.time_base = 0, Fraction(1, sound.rate)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())

"""Pixels to files, in memory."""

import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from deployments.request import OutputFormat

Frames = npt.NDArray[np.uint8]
"""[F, H, W, 3], RGB."""

MEDIA_TYPES: dict[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
}


def encode_media(frames: Frames, output_format: OutputFormat, *, compression: int, fps: int) -> bytes:
    """A picture (the first frame) or an MP4 of all frames.

    compression is the quality from 0 to 100 of JPEG and WebP; at 100 WebP is lossless.
    """
    if output_format == "mp4":
        return _encode_mp4(frames, fps)
    options = {
        "png": {"compress_level": 1},  # level 6 takes four times as long and saves a tenth
        "jpeg": {"quality": compression},
        "webp": {"quality": compression, "lossless": compression == 100, "method": 2},
    }[output_format]
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, output_format, **options)
    return file.getvalue()


X264_OPTIONS = {"crf": "18", "x264-params": "mbtree=0"}
"""Constant quality, visually lossless. No mbtree: with it the file depends on what lies in memory, and the same
frames come to other files (seen from 64x64 to 480x832 with libavcodec 62.28)."""


def _encode_mp4(frames: Frames, fps: int) -> bytes:
    """H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=X264_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()

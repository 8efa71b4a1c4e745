"""Input images, masks and videos."""

from io import BytesIO
from typing import Any

import av
import numpy as np
from PIL import Image


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    """Returns an image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def half_mask(side: int = 64) -> Image.Image:
    """Returns a mask whose right half is white, which is redrawn."""
    return Image.fromarray(np.uint8(np.arange(side)[None].repeat(side, 0) > side // 2) * 255)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def video(
    num_frames: int = 9,
    size: tuple[int, int] = (96, 64),
    *,
    fps: int = 24,
    codec: str = "libx264",
    container: str = "mp4",
    turned: int = 0,
) -> bytes:
    """Returns a video of moving noise. turned: degrees, counterclockwise, by which a player must rotate it."""
    file, (width, height) = BytesIO(), size
    noise = np.random.default_rng(0).integers(0, 255, (height, 2 * width, 3), dtype=np.uint8)
    with av.open(file, "w", format=container) as made:
        stream: Any = made.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for i in range(num_frames):
            shifted = np.ascontiguousarray(noise[:, i % width : i % width + width])
            made.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        made.mux(stream.encode())
    return file.getvalue()

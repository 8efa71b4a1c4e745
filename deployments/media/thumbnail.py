"""Makes the still image that is stored beside a video."""

import io
from fractions import Fraction

import av
from PIL import Image

MAX_SIDE = 512


def make_thumbnail(video: bytes) -> bytes:
    """Returns a WebP of the video's middle frame: the first frame is often black, or the input image.

    Raises ValueError if the video has no frames.
    """
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        middle = Fraction(stream.frames // 2) / Fraction(stream.average_rate or 1)
        if stream.time_base:
            container.seek(int(middle / stream.time_base), stream=stream)
        chosen = None
        for chosen in container.decode(stream):
            if chosen.pts is None or stream.time_base is None or chosen.pts * stream.time_base >= middle:
                break
    if chosen is None:
        raise ValueError("the video has no frames")
    picture: Image.Image = chosen.to_image()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "webp", quality=80)
    return file.getvalue()

"""Thumbnails: a still image of a video."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from deployments.media.pixels import encode_media
from deployments.media.thumbnail import MAX_SIDE, make_thumbnail


def still(num_frames: int, width: int = 64, height: int = 48) -> Image.Image:
    """Returns the thumbnail of a video whose frames grow from black to white."""
    greys = np.linspace(0, 255, num_frames) if num_frames > 1 else np.full(1, 255.0)
    frames = np.broadcast_to(greys[:, None, None, None], (num_frames, height, width, 3)).astype(np.uint8)
    return Image.open(BytesIO(make_thumbnail(encode_media(frames, "mp4", compression=100, fps=8))))


@pytest.mark.parametrize("num_frames", [1, 2, 5, 81])
def test_it_is_the_frame_in_the_middle(num_frames: int) -> None:
    picture = still(num_frames)
    assert (picture.format, picture.size) == ("WEBP", (64, 48))
    grey = 255.0 if num_frames == 1 else np.linspace(0, 255, num_frames)[num_frames // 2]
    assert np.asarray(picture.convert("L")).mean() == pytest.approx(grey, abs=6)


def test_it_is_small_however_large_the_video_is() -> None:
    assert still(2, 2 * MAX_SIDE, MAX_SIDE).size == (MAX_SIDE, MAX_SIDE // 2)

"""Pixels survive their files."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from deployments.stages.media import Frames, encode_media


@pytest.fixture
def frames() -> Frames:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (48, 1)), np.tile(ramp[:48, None], (1, 64)), np.full((48, 64), 99)], axis=2)
    return np.stack([np.roll(picture, 4 * i, axis=1) for i in range(9)]).astype(np.uint8)


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_png_and_webp_at_100_are_lossless(frames: Frames, output_format: str) -> None:
    data = encode_media(frames[:1], output_format, compression=100, fps=1)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), frames[0])


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lower_quality_makes_a_smaller_file(frames: Frames, output_format: str) -> None:
    low, high = (encode_media(frames[:1], output_format, compression=q, fps=1) for q in (10, 90))
    assert len(low) < len(high)


def test_an_mp4_has_all_frames_in_order_at_the_asked_rate(frames: Frames) -> None:
    with av.open(io.BytesIO(encode_media(frames, "mp4", compression=100, fps=8))) as container:
        assert container.streams.video[0].average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape
    distance = np.abs(decoded.astype(int) - frames.astype(int)).mean(axis=(1, 2, 3))
    swapped = np.abs(decoded.astype(int) - frames[::-1].astype(int)).mean()
    assert distance.max() < swapped / 2

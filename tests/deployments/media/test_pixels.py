"""Image and video files hold the pixels that they were made of."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from deployments.media.pixels import MEDIA_TYPES, Frames, Sound, encode_media
from deployments.request import OutputFormat

FPS = 24


@pytest.fixture
def noise() -> Frames:
    """One image, not square, in which no two pixels are equal: the hardest for every format."""
    return np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)


@pytest.fixture
def film() -> Frames:
    """A video of nine frames, in which a bright square moves to the right."""
    frames = np.full((9, 48, 64, 3), 32, np.uint8)
    for i, frame in enumerate(frames):
        frame[16:32, 4 * i : 4 * i + 16] = 224
    return frames


def encode(frames: Frames, output_format: OutputFormat, compression: int = 100) -> bytes:
    return encode_media(frames, output_format, compression=compression, fps=FPS)


def pixels(data: bytes) -> Frames:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_png_and_full_quality_webp_lose_nothing(noise: Frames, output_format: OutputFormat) -> None:
    assert np.array_equal(pixels(encode(noise, output_format)), noise[0])


@pytest.mark.parametrize(
    ("output_format", "compression", "options"),
    [
        ("jpeg", 100, {"quality": 100}),
        ("jpeg", 30, {"quality": 30}),
        ("webp", 99, {"quality": 99, "method": 2}),
        ("webp", 30, {"quality": 30, "method": 2}),
    ],
)
def test_compression_is_pillows_quality(
    noise: Frames, output_format: OutputFormat, compression: int, options: dict[str, Any]
) -> None:
    file = io.BytesIO()
    Image.fromarray(noise[0]).save(file, output_format, **options)
    assert encode(noise, output_format, compression) == file.getvalue()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lower_compression_quality_makes_smaller_files(noise: Frames, output_format: OutputFormat) -> None:
    sizes = [len(encode(noise, output_format, compression)) for compression in (0, 50, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_is_of_the_format_its_media_type_says(noise: Frames, output_format: OutputFormat) -> None:
    picture = Image.open(io.BytesIO(encode(noise, output_format)))
    assert picture.get_format_mimetype() == MEDIA_TYPES[output_format]
    assert (picture.size, picture.mode) == ((64, 48), "RGB")


def test_an_mp4_has_the_frames_the_size_and_the_rate_it_was_given(film: Frames) -> None:
    with av.open(io.BytesIO(encode(film, "mp4"))) as container:
        [stream] = container.streams
        assert (stream.codec_context.width, stream.codec_context.height) == (64, 48)
        assert stream.average_rate == Fraction(FPS)
        assert len(list(container.decode(stream))) == len(film)


def test_an_mp4_shows_what_it_was_given_in_order(film: Frames) -> None:
    with av.open(io.BytesIO(encode(film, "mp4"))) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for shown, given in zip(decoded, film, strict=True):
        assert np.abs(shown.astype(int) - given).mean() < 2


@pytest.mark.parametrize(("rate", "num_channels"), [(16_000, 1), (24_000, 2), (44_100, 1), (48_000, 2)])
def test_an_mp4_sounds_as_it_was_given_and_when(film: Frames, rate: int, num_channels: int) -> None:
    """Each channel has a chirp of another pitch, after silence: a delay by one packet of AAC would change it."""
    seconds = np.arange(rate * len(film) // FPS) / rate
    pitches = np.array([[300.0], [500.0]][:num_channels])
    given = np.float32(0.5 * np.sin(2 * np.pi * pitches * seconds**2) * (seconds > 0.1))
    data = encode_media(film, "mp4", compression=100, fps=FPS, sound=Sound(given, rate))
    with av.open(io.BytesIO(data)) as container:
        [stream] = container.streams.audio
        assert (stream.rate, stream.channels) == (rate, num_channels)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
    assert np.abs(heard[:, : given.shape[1]] - given).mean() < 0.02
    with av.open(io.BytesIO(data)) as container:
        assert len(list(container.decode(video=0))) == len(film)
        assert container.duration == pytest.approx(len(film) / FPS * av.time_base, rel=0.02)


def test_sound_that_is_too_loud_is_cut_off_and_not_turned_round(film: Frames) -> None:
    loud = Sound(np.full((1, 4096), 1.5, np.float32), 16_000)
    with av.open(io.BytesIO(encode_media(film, "mp4", compression=100, fps=FPS, sound=loud))) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert 0.9 < heard[0, 2048:3072].mean() < 1.1


def test_one_frame_is_a_video_too(noise: Frames) -> None:
    with av.open(io.BytesIO(encode(noise, "mp4"))) as container:
        assert len(list(container.decode(video=0))) == 1


def test_the_same_frames_are_the_same_file_whatever_lies_in_memory() -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (9, 16, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    files = set()
    for _ in range(20):
        litter = [random.bytes(random.integers(100, 1_000_000)) for _ in range(4)]
        files.add(encode(frames, "mp4"))
        del litter
    assert len(files) == 1

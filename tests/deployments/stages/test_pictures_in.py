"""Input images: how files are read, and what is kept of them."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.errors import WrongField
from deployments.families.calls import find_calls
from deployments.media.video_file import read_frames
from deployments.request import InputPictures, MediaSize
from deployments.stages import load_stage
from deployments.stages.pixels.pictures import open_pictures, picture_arguments
from tests.deployments.variants import build_request, draw_staged, encode, load_denoising, read_model
from tests.pictures import half_mask, picture, png, video


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return read_model(fetch_checkpoint("tiny://flux", ()))


def opened(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    [found] = open_pictures(InputPictures((buffer.getvalue(),)))["image"]
    return found


def test_what_is_transparent_shows_white() -> None:
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    assert opened(clear).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_shows_white_there() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 1), 1)
    found = opened(image, transparency=0)
    assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 255, 255), (0, 200, 0))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    deep = Image.fromarray(np.full((64, 64), 0x8080, np.uint16))
    assert opened(deep).getpixel((0, 0)) == (128, 128, 128)


def test_a_photograph_is_turned_as_its_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate to the right
    image = Image.new("RGB", (64, 32), "red")
    assert opened(image, "JPEG", exif=exif).size == (32, 64)


def test_a_mask_with_an_alpha_channel_draws_anew_what_is_transparent() -> None:
    alpha = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    alpha.putpixel((3, 3), (255, 255, 255, 0))
    mask = open_pictures(InputPictures((png(picture()),), png(alpha)))["mask_image"]
    assert (mask.getpixel((3, 3)), mask.getpixel((0, 0))) == (255, 0)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(WrongField, match="32x32 pixels, but the first image has 64x64") as refused:
        open_pictures(InputPictures((png(picture()),), png(half_mask(32))))
    assert refused.value.param == "mask"


@pytest.mark.parametrize("data", [b"", b"GIF89a", png(picture())[:500]])
def test_what_is_no_whole_picture_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(WrongField, match="cannot be read") as refused:
        open_pictures(InputPictures((data,)))
    assert refused.value.param == "image"


@pytest.mark.parametrize(
    ("film", "told"),
    [
        (video(4), "only 4 of its frames can be read, but 5 are asked for: set num_frames to 4"),
        (video(9, codec="libvpx", container="webm")[:4000], "of its frames can be read, but 5 are asked for"),
        (b"no video", "its frame 1 cannot be read"),
    ],
    ids=["short", "cut", "none"],
)
def test_a_video_of_fewer_frames_than_it_said_is_refused_by_name(film: bytes, told: str) -> None:
    pictures = InputPictures(video=film, field="input_reference")
    with pytest.raises(WrongField, match=told) as refused:
        open_pictures(pictures, MediaSize(64, 64, 5), reads_video=True)
    assert refused.value.param == "input_reference"


def test_frames_are_as_large_as_the_request_as_diffusers_own_processor_makes_them() -> None:
    film, size = video(5, (96, 80)), MediaSize(64, 48, 3)
    opened = open_pictures(InputPictures(video=film), size, reads_video=True)["video"]
    processor = VideoProcessor(vae_scale_factor=8)
    plain = processor.preprocess_video(list(read_frames(film))[:3], height=48, width=64)
    assert torch.equal(processor.preprocess_video(opened, height=48, width=64), plain)


@pytest.mark.parametrize("size", [(100, 70), (40, 90), (64, 64)])
def test_a_picture_that_tells_a_video_its_size_is_cut_as_its_pipeline_would_cut_it(size: tuple[int, int]) -> None:
    """The pipeline is that of HunyuanVideo 1.5."""
    call, image = find_calls("HunyuanVideo15ImageToVideoPipeline")["image_to_video"], Image.new("RGB", size, "red")
    image.putdata([(x % 256, x % 7, x % 31) for x in range(size[0] * size[1])])
    cut = picture_arguments(call, {"image": [image]}, (80, 48))["image"]
    processor = HunyuanVideo15ImageProcessor()
    for given in (image, cut):
        made = processor.resize(given, height=48, width=80, resize_mode="crop")
        assert np.array_equal(np.asarray(made), np.asarray(cut))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_video_is_turned_as_its_camera_was_held(degrees: int) -> None:
    [turned, plain] = [next(read_frames(video(1, (96, 64), turned=angle))) for angle in (degrees, 0)]
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(plain), degrees // 90))


def test_a_picture_that_was_seen_lately_costs_no_encode(model: ModelConfig) -> None:
    stage = load_stage("decode", model, VaeConfig())
    request, pictures = build_request(model, "edit"), InputPictures((png(picture()),))
    encodings = encode(model, request, pictures)
    for seed in range(3):
        stage.prepare(encodings, build_request(model, "edit", strength=0.5 + seed / 10), pictures)
    assert stage.num_encoded == 1


def test_another_strength_draws_another_picture(model: ModelConfig) -> None:
    pictures = InputPictures((png(picture()),))
    drawn = [
        draw_staged(model, build_request(model, "edit", num_inference_steps=4, strength=strength), pictures)
        for strength in (0.5, 1.0)
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 8


def test_steps_are_counted_from_where_the_drawing_begins(model: ModelConfig) -> None:
    request = build_request(model, "edit", num_inference_steps=4, strength=0.5)
    stage, steps = load_denoising(model), list[int]()
    stage.denoise(stage.join(), None, request, lambda step, _latents: steps.append(step), max_sequence_length=32)
    stage.close()
    assert steps == [3, 4]


def test_a_picture_that_its_pipeline_does_not_take_is_told_by_name() -> None:
    """FLUX.2 refuses images of less than 64 pixels."""
    klein = read_model(fetch_checkpoint("tiny://flux2-klein", ()))
    request = build_request(klein, "edit", num_inference_steps=2)
    with pytest.raises(WrongField, match="Both dimensions must be at least 64px") as refused:
        draw_staged(klein, request, InputPictures((png(picture(side=32)),)))
    assert refused.value.param == "image"

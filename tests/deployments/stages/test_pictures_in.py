"""Pictures that go in: drawn anew, edited, filled in, bit-equal to the plain pipeline of that kind of call."""

from functools import cache
from io import BytesIO
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import ModelConfig
from deployments.request import CallKind, InputPictures
from tests.deployments.variants import SEED, build_request, draw_staged, read_model

SIDE = 64
FAMILIES = ("flux", "sd15", "sdxl", "sd3", "qwen-image")


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask() -> Image.Image:
    """White, which is drawn anew, on the right."""
    return Image.fromarray(np.uint8(np.arange(SIDE)[None].repeat(SIDE, 0) > SIDE // 2) * 255)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@cache
def model(name: str) -> ModelConfig:
    return read_model(fetch_checkpoint(f"tiny://{name}", ()))


def draw_plain(name: str, kind: CallKind, **asked: Any) -> np.ndarray:
    """[F, H, W, 3] by the class that diffusers has for this kind of call."""
    base = diffusers.DiffusionPipeline.from_pretrained(fetch_checkpoint(f"tiny://{name}", ()))
    pipeline_class: Any = getattr(diffusers, model(name).architecture.calls[kind].pipeline_class)
    pipe = base if type(base) is pipeline_class else pipeline_class.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    import torch

    generator = torch.Generator().manual_seed(SEED)
    output = np.asarray(pipe(generator=generator, output_type="np", **asked)[0])
    return (output.reshape(-1, *output.shape[-3:]) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["edit", "inpaint"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_is_drawn_anew_as_the_plain_pipeline_does(name: str, kind: CallKind) -> None:
    request = build_request(model(name), kind, num_inference_steps=4, strength=0.75)
    pictures = InputPictures((png(picture()),), png(half_mask()) if kind == "inpaint" else None)
    asked = {"prompt": request.prompt.text, "num_inference_steps": 4, "strength": 0.75, "image": picture()}
    if kind == "inpaint":
        asked["mask_image"] = half_mask()
    if "height" in model(name).architecture.calls[kind].parameters:
        asked |= {"height": SIDE, "width": SIDE}
    np.testing.assert_array_equal(draw_staged(model(name), request, pictures), draw_plain(name, kind, **asked))

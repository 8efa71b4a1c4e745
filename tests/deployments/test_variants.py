"""Common variants of checkpoints draw what plain diffusers draws from the same folder, bit for bit."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.deployments.variants import (
    build_request,
    draw_plain,
    draw_staged,
    edit,
    read_model,
    set_model,
    write_tiny,
)
from tests.thorough import usually

pytestmark = pytest.mark.slow

WAN_22_VAE = {
    "base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "temperal_downsample": [False, True, True],
    "latents_mean": [0.1] * 48, "latents_std": [1.1] * 48,
}  # fmt: skip


def kl_of_factor(num_blocks: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        blocks = {
            "block_out_channels": (8,) * num_blocks,
            "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
            "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
        }
        set_model(folder, "vae", "AutoencoderKL", **blocks)

    return change


def qwen_of_factor(num_blocks: int) -> Callable[[Path], None]:
    times = [False, True, True, False][: num_blocks - 1]
    return lambda folder: set_model(
        folder, "vae", "AutoencoderKLQwenImage", dim_mult=[1] * num_blocks, temperal_downsample=times
    )


def tiny_vae(latent_channels: int) -> Callable[[Path], None]:
    widths = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    return lambda folder: set_model(folder, "vae", "AutoencoderTiny", latent_channels=latent_channels, **widths)


def wan_22(folder: Path) -> None:
    set_model(folder, "transformer", "WanTransformer3DModel", in_channels=48, out_channels=48)
    set_model(folder, "vae", "AutoencoderKLWan", **WAN_22_VAE)
    edit(folder / "model_index.json", expand_timesteps=True)


def wan_of_two_frames(folder: Path) -> None:
    set_model(folder, "vae", "AutoencoderKLWan", temperal_downsample=[False, False, True], scale_factor_temporal=2)


def without_t5(folder: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(folder)


def in_parts(folder: Path) -> None:
    pipe = FluxPipeline.from_pretrained(folder)
    for name in ("transformer", "text_encoder_2"):
        shutil.rmtree(folder / name)
        pipe.components[name].save_pretrained(folder / name, max_shard_size="200KB")
        assert list((folder / name).glob("*.index.json"))


def as_fp16_but_for_the_text_encoder(folder: Path) -> None:
    for name in ("unet", "vae"):
        plain = folder / name / "diffusion_pytorch_model.safetensors"
        tensors = load_file(plain)
        save_file({key: value.half() for key, value in tensors.items()}, plain.with_suffix(".fp16.safetensors"))
        plain.unlink()


def test_a_variant_that_some_components_lack_draws_what_the_plain_pipeline_draws(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "sd15")
    as_fp16_but_for_the_text_encoder(folder)
    model = read_model(folder, variant="fp16")
    request = build_request(model)
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16")
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(pipe, request))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("flux", kl_of_factor(3)),
        ("qwen-image", qwen_of_factor(5)),
        ("wan", wan_22),
        ("wan", wan_of_two_frames),
        ("sd15", tiny_vae(4)),
        ("sd3", without_t5),
        ("flux", in_parts),
        *usually(
            [
                ("flux", kl_of_factor(5)),
                ("sd15", kl_of_factor(3)),
                ("sdxl", kl_of_factor(5)),
                ("sd3", kl_of_factor(3)),
                ("qwen-image", qwen_of_factor(3)),
                ("flux", tiny_vae(16)),
            ],
            lambda _: False,
        ),
    ],
)
def test_a_variant_draws_what_the_plain_pipeline_draws(
    tmp_path: Path, family: str, change: Callable[[Path], None]
) -> None:
    folder = write_tiny(family, tmp_path / family)
    change(folder)
    model = read_model(folder)
    request = build_request(model)
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(folder, request))


def test_the_size_by_default_is_what_the_pipeline_draws_by_default(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    edit(folder / "unet" / "config.json", sample_size=[8, 12])
    model = read_model(folder)
    size = model.default_size
    request = build_request(model, width=size.width, height=size.height)
    plain = draw_plain(folder, request, width=None, height=None)
    np.testing.assert_array_equal(draw_staged(model, request), plain)


@pytest.mark.parametrize("size", [{"width": 64, "height": 64}, {"width": 96, "height": 48}])
def test_a_pipeline_that_resizes_by_itself_draws_the_size_that_was_asked_for(
    tmp_path: Path, size: Mapping[str, Any]
) -> None:
    folder = write_tiny("flux", tmp_path / "x")
    edit(folder / "model_index.json", _class_name="FluxKontextPipeline")
    model = read_model(folder, "flux")
    request = build_request(model, **size)
    frames = draw_staged(model, request)
    assert frames.shape[1:3] == (size["height"], size["width"])
    area = request.width * request.height
    np.testing.assert_array_equal(frames, draw_plain(folder, request, max_area=area))

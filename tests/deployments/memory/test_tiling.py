"""A VAE with tiles needs the memory of one tile and of the media, so 4K and long videos fit bounded memory."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderTiny

from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.memory.config import TilingConfig
from deployments.memory.tiling import set_tiles
from deployments.memory.working import working_bytes
from deployments.stages import load_stage

KINDS: dict[str, Any] = {
    "flux": partial(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 64),
        latent_channels=16,
    ),
    "qwen-image": partial(AutoencoderKLQwenImage, base_dim=32, num_res_blocks=1),
    "wan": partial(AutoencoderKLWan, base_dim=32, num_res_blocks=1),
}
TILES = TilingConfig(tile_size=128, overlap=0.0625)
COPIES = 3
"""Copies of the media that tiling holds: the joined result, and the tiles that it is joined from."""


def build(kind: str, tiles: TilingConfig | None) -> Any:
    """Builds a VAE on the meta device, where a call makes tensors without computing them."""
    with torch.device("meta"):
        vae = KINDS[kind]().eval()
    if tiles is not None:
        set_tiles(vae, tiles)
    return vae


def working(vae: Any, direction: str, size: int, num_frames: int = 1) -> int:
    is_decode, is_picture = direction == "decode", isinstance(vae, AutoencoderKL)
    factor, channels = (8, 16) if is_decode else (1, 3)
    latent_frames = (num_frames - 1) // 4 + 1
    frames = () if is_picture else (latent_frames if is_decode else num_frames,)
    media = torch.empty(1, channels, *frames, size // factor, size // factor, device="meta")
    return working_bytes(vae, partial(getattr(vae, direction), media, return_dict=False))


def media_bytes(size: int, num_frames: int = 1) -> int:
    return 3 * num_frames * size * size * 4


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_picture_takes_no_more_than_its_own_pixels(kind: str, direction: str) -> None:
    small, large = (working(build(kind, TILES), direction, size) for size in (256, 512))
    assert large - small <= COPIES * (media_bytes(512) - media_bytes(256))
    assert large < working(build(kind, None), direction, 512) / 3


WHOLE: dict[str, Any] = {
    "kl": partial(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    ),
    "tiny": partial(AutoencoderTiny, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
    "tiny of factor 4": partial(
        AutoencoderTiny,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
    "qwen-image": partial(AutoencoderKLQwenImage, base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "wan": partial(AutoencoderKLWan, base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 64), (64, 16)])
@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_a_picture_of_at_most_one_tile_is_not_changed(kind: str, height: int, width: int) -> None:
    torch.manual_seed(0)
    vae = WHOLE[kind]().eval()
    media = torch.rand(1, 3, *((1,) if hasattr(vae, "tile_sample_stride_height") else ()), height, width)
    latents = encoded(vae, media)
    whole = vae.decode(latents, return_dict=False)[0]
    set_tiles(vae, TilingConfig(tile_size=64))
    assert torch.equal(encoded(vae, media), latents)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], whole)
    assert whole.shape == media.shape


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if "tiny" in kind])
@torch.no_grad()
def test_a_larger_picture_of_a_tiny_vae_keeps_its_size(kind: str) -> None:
    vae = WHOLE[kind]().eval()
    set_tiles(vae, TilingConfig(tile_size=64))
    media = torch.rand(1, 3, 128, 160)
    assert vae.decode(encoded(vae, media), return_dict=False)[0].shape == media.shape


def encoded(vae: Any, media: torch.Tensor) -> torch.Tensor:
    output = vae.encode(media)
    latents: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.mean
    return latents


def test_status_names_slices_and_tiles_among_the_techniques() -> None:
    config = VaeConfig(slicing=True, tiling=128, channels_last=True)
    stage = load_stage("decode", ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux"), config)
    assert stage.residency.stats().applied == ("slicing", "tiling: 128", "channels_last", "device: cpu")


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_longer_video_takes_no_more_than_its_own_pixels(direction: str) -> None:
    short, long = (working(build("wan", TILES), direction, 192, num_frames) for num_frames in (9, 13))
    assert long - short <= COPIES * (media_bytes(192, 13) - media_bytes(192, 9))

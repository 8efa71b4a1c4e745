"""Sets a VAE's tiles, for which diffusers' 2-D and 3-D VAEs have different attributes."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from deployments.memory.config import TilingConfig


def set_tiles(vae: Any, config: TilingConfig) -> None:
    """Makes the VAE decode and encode in tiles. An image of at most one tile is not changed.

    Raises ValueError if the tile size is not a multiple of the VAE's compression factor.
    """
    vae.enable_tiling()
    if hasattr(vae, "tile_sample_stride_height"):
        _set_3d(vae, config)
    else:
        _set_2d(vae, config)


def is_tiled(vae: Any, latents: torch.Tensor) -> bool:
    """Whether the VAE decodes these latents in several tiles, or in several groups of frames."""
    if not getattr(vae, "use_tiling", False):
        return False
    if not hasattr(vae, "tile_sample_stride_height"):
        limits: tuple[int, ...] = (vae.tile_latent_min_size, vae.tile_latent_min_size)
    else:
        factor = vae.spatial_compression_ratio
        limits = (vae.tile_sample_min_height // factor, vae.tile_sample_min_width // factor)
    if getattr(vae, "use_framewise_decoding", False):
        limits = (vae.tile_sample_min_num_frames // vae.temporal_compression_ratio, *limits)
    return any(size > limit for size, limit in zip(latents.shape[-len(limits) :], limits, strict=True))


def _set_2d(vae: Any, config: TilingConfig) -> None:
    """Sets the tiles of AutoencoderKL and similar VAEs: one size for both axes, and the overlap as a share."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if config.tile_size is not None:
        _check(config.tile_size, factor)
        vae.tile_sample_min_size = config.tile_size
        vae.tile_latent_min_size = config.tile_size // factor
    elif hasattr(vae, "spatial_scale_factor"):
        vae.tile_latent_min_size = vae.tile_sample_min_size // factor
    # The overlap is a whole number of latents, as an exact fraction: if rounding differed between latents and
    # pixels, the image would get another size.
    latents = vae.tile_latent_min_size
    vae.tile_overlap_factor = Fraction(min(max(1, round(latents * config.overlap)), latents - 1), latents)
    if hasattr(vae, "spatial_scale_factor"):
        _mend_tiny(vae, factor)


def _mend_tiny(vae: Any, factor: int) -> None:
    """Corrects AutoencoderTiny: it assumes a factor of 8, and blends an image of one tile with parts of itself."""

    def or_whole(tiled: Callable[..., torch.Tensor], whole: Callable[..., torch.Tensor], tile: int) -> Any:
        return lambda x: whole(x) if max(x.shape[-2:]) <= tile else tiled(x)

    vae.spatial_scale_factor = factor
    vae._tiled_decode = or_whole(vae._tiled_decode, vae.decoder, vae.tile_latent_min_size)
    vae._tiled_encode = or_whole(vae._tiled_encode, vae.encoder, vae.tile_sample_min_size)


def _set_3d(vae: Any, config: TilingConfig) -> None:
    """Sets the tiles of the VAEs of Wan and Qwen-Image: separate height and width, and strides, not overlaps."""
    factor = vae.spatial_compression_ratio
    for axis in ("height", "width"):
        tile = config.tile_size or getattr(vae, f"tile_sample_min_{axis}")
        _check(tile, factor)
        stride = max(1, round(tile * (1 - config.overlap) / factor)) * factor
        setattr(vae, f"tile_sample_min_{axis}", tile)
        setattr(vae, f"tile_sample_stride_{axis}", stride)
        if hasattr(vae, f"tile_latent_min_{axis}"):  # of the DC-AE: larger latents are tiled
            setattr(vae, f"tile_latent_min_{axis}", tile // factor)


def _check(tile_size: int, factor: int) -> None:
    if tile_size % factor:
        raise ValueError(f"tiling.tile_size must be a multiple of the VAE's factor {factor}, got {tile_size}")

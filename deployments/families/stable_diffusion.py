"""Stable Diffusion 1.5, XL and 3: classifier-free guidance by one forward over both prompts."""

from math import lcm
from typing import Any

from deployments.families.family import Family
from deployments.families.geometry import Config, Configs, Geometry, blocks_factor, sample_sides, unet_sample_size


def _geometry_sd15(configs: Configs) -> Geometry:
    return _unet_geometry(unet_sample_size(configs["unet"]), configs["vae"])


def _geometry_sdxl(configs: Configs) -> Geometry:
    return _unet_geometry(configs["unet"].get("sample_size"), configs["vae"])


def _unet_geometry(sample_size: Any, vae: Config) -> Geometry:
    """Computes a UNet's geometry.

    The multiple of sizes is 8 by the pipelines' `check_inputs`; more if the VAE has a larger factor, because the
    pipelines round sizes down to that.
    """
    factor = blocks_factor(vae)
    multiple = lcm(8, factor)
    return Geometry(*sample_sides(sample_size, factor), multiple, factor, vae.get("latent_channels", 4))


def _geometry_sd3(configs: Configs) -> Geometry:
    transformer, factor = configs["transformer"], blocks_factor(configs["vae"])
    pixels = factor * transformer.get("patch_size", 2)
    return Geometry(
        *sample_sides(transformer.get("sample_size", 128), factor),
        size_multiple=pixels,
        latent_pixels=factor,
        latent_channels=configs["vae"].get("latent_channels", 4),
        max_side=pixels * transformer.get("pos_embed_max_size", 96),
    )


def _vae(latent_channels: int) -> Config:
    """Returns the config values that the published VAEs have in common."""
    return {"block_out_channels": (128, 256, 512, 512), "latent_channels": latent_channels}


SD15 = Family(
    name="sd15",
    pipeline_class="StableDiffusionPipeline",
    geometry=_geometry_sd15,
    published={"unet": {"sample_size": 64}, "vae": _vae(4)},
)

SDXL = Family(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    geometry=_geometry_sdxl,
    published={"unet": {"sample_size": 128}, "vae": _vae(4)},
    upcasts_vae=True,
)

SD3 = Family(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    geometry=_geometry_sd3,
    published={"transformer": {"sample_size": 128, "pos_embed_max_size": 192}, "vae": _vae(16)},
)

"""Stable Diffusion 1.5, XL and 3: classifier-free guidance by one forward over both prompts."""

from math import lcm
from typing import Any

from deployments.families.family import Defaults, Family
from deployments.families.geometry import Config, Configs, Geometry, blocks_factor, sample_sides, unet_sample_size

PAIR = ("prompt_embeds", "negative_prompt_embeds")
CLIP_TOKENS = 77
"""Of every prompt: CLIP pads to this length."""
_NUM_TIME_IDS = 6
"""SDXL's original size, crop and target size, which its UNet embeds beside the pooled text."""
POOLED_PAIR = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _geometry_sd15(configs: Configs) -> Geometry:
    return _unet_geometry(unet_sample_size(configs["unet"]), configs["vae"])


def _geometry_sdxl(configs: Configs) -> Geometry:
    return _unet_geometry(configs["unet"].get("sample_size"), configs["vae"])


def _unet_geometry(sample_size: Any, vae: Config) -> Geometry:
    """8 by the pipelines' `check_inputs`; more where the VAE has a larger factor, for they round down to it."""
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
    """What all published ones have in common."""
    return {"block_out_channels": (128, 256, 512, 512), "latent_channels": latent_channels}


def _family(name: str, pipeline_class: str, defaults: Defaults, **own: Any) -> Family:
    return Family(
        name=name,
        pipeline_class=pipeline_class,
        media="image",
        defaults=defaults,
        guidance="guidance_scale",
        needs_negative_prompt=False,
        **own,
    )


SD15 = _family(
    "sd15",
    "StableDiffusionPipeline",
    Defaults(num_inference_steps=50, guidance_scale=7.5, true_cfg_scale=None),
    geometry=_geometry_sd15,
    published={"unet": {"sample_size": 64}, "vae": _vae(4)},
    max_sequence_length=None,
)

SDXL = _family(
    "sdxl",
    "StableDiffusionXLPipeline",
    Defaults(num_inference_steps=50, guidance_scale=5.0, true_cfg_scale=None),
    geometry=_geometry_sdxl,
    published={"unet": {"sample_size": 128}, "vae": _vae(4)},
    max_sequence_length=None,
    upcasts_vae=True,
)

SD3 = _family(
    "sd3",
    "StableDiffusion3Pipeline",
    Defaults(num_inference_steps=28, guidance_scale=7.0, true_cfg_scale=None),
    geometry=_geometry_sd3,
    published={"transformer": {"sample_size": 128, "pos_embed_max_size": 192}, "vae": _vae(16)},
    max_sequence_length=256,
)

"""Stable Diffusion 1.5, XL and 3: classifier-free guidance by one forward over both prompts."""

from collections.abc import Mapping
from math import lcm
from typing import TYPE_CHECKING, Any

from deployments.families.family import Defaults, Embeds, Family, Pipeline, Shape, unscale_kl
from deployments.families.geometry import Config, Configs, Geometry, blocks_factor, sample_sides, unet_sample_size
from deployments.request import GenerationRequest, MediaSize, Prompt

if TYPE_CHECKING:
    import torch

PAIR = ("prompt_embeds", "negative_prompt_embeds")
CLIP_TOKENS = 77
"""Of every prompt: CLIP pads to this length."""
_NUM_TIME_IDS = 6
"""SDXL's original size, crop and target size, which its UNet embeds beside the pooled text."""
POOLED_PAIR = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _encode_sd15(pipe: Pipeline, prompt: Prompt, _max_sequence_length: int | None) -> Embeds:
    device = pipe._execution_device  # under some offloading weights wait elsewhere
    embeds = pipe.encode_prompt(prompt.text, device, 1, prompt.is_guided, negative_prompt=prompt.negative_text)
    return dict(zip(PAIR, embeds, strict=True))


def _encode_sdxl(pipe: Pipeline, prompt: Prompt, _max_sequence_length: int | None) -> Embeds:
    embeds = pipe.encode_prompt(
        prompt=prompt.text,
        negative_prompt=prompt.negative_text,
        do_classifier_free_guidance=prompt.is_guided,
    )
    return dict(zip(PAIR + POOLED_PAIR, embeds, strict=True))


def _encode_sd3(pipe: Pipeline, prompt: Prompt, max_sequence_length: int | None) -> Embeds:
    embeds = pipe.encode_prompt(
        prompt=prompt.text,
        prompt_2=None,
        prompt_3=None,
        negative_prompt=prompt.negative_text,
        do_classifier_free_guidance=prompt.is_guided,
        max_sequence_length=max_sequence_length,
    )
    return dict(zip(PAIR + POOLED_PAIR, embeds, strict=True))


def _embed_shapes_sdxl(config: Mapping[str, Any], _tokens: int) -> dict[str, tuple[int, ...]]:
    times = _NUM_TIME_IDS * config["addition_time_embed_dim"]
    return {
        "prompt_embeds": (1, CLIP_TOKENS, config["cross_attention_dim"]),
        "pooled_prompt_embeds": (1, config["projection_class_embeddings_input_dim"] - times),
    }


def _call(request: GenerationRequest) -> dict[str, Any]:
    return {"guidance_scale": request.guidance_scale}


def _unscale(pipe: Pipeline, latents: "torch.Tensor", _height: int, _width: int) -> "torch.Tensor":
    return unscale_kl(pipe, latents)


def _unscale_sdxl(pipe: Pipeline, latents: "torch.Tensor", _height: int, _width: int) -> "torch.Tensor":
    """Some SDXL fine-tunes (Playground) give their latents' mean and deviation beside the scaling factor."""
    config = pipe.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return unscale_kl(pipe, latents)
    unscaled: torch.Tensor = latents * latents.new_tensor(std).view(1, -1, 1, 1) / config.scaling_factor
    return unscaled + latents.new_tensor(mean).view(1, -1, 1, 1)


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


def _latents_shape(of: Geometry, size: MediaSize) -> Shape:
    return 1, of.latent_channels, size.height // of.latent_pixels, size.width // of.latent_pixels


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
        call=_call,
        latents_shape=_latents_shape,
        **own,
    )


SD15 = _family(
    "sd15",
    "StableDiffusionPipeline",
    Defaults(num_inference_steps=50, guidance_scale=7.5, true_cfg_scale=None),
    denoiser="unet",
    geometry=_geometry_sd15,
    published={"unet": {"sample_size": 64}, "vae": _vae(4)},
    max_sequence_length=None,
    encode=_encode_sd15,
    embed_shapes=lambda config, _tokens: {"prompt_embeds": (1, CLIP_TOKENS, config["cross_attention_dim"])},
    unscale=_unscale,
)

SDXL = _family(
    "sdxl",
    "StableDiffusionXLPipeline",
    Defaults(num_inference_steps=50, guidance_scale=5.0, true_cfg_scale=None),
    denoiser="unet",
    geometry=_geometry_sdxl,
    published={"unet": {"sample_size": 128}, "vae": _vae(4)},
    max_sequence_length=None,
    encode=_encode_sdxl,
    embed_shapes=_embed_shapes_sdxl,
    unscale=_unscale_sdxl,
    upcasts_vae=True,
)

SD3 = _family(
    "sd3",
    "StableDiffusion3Pipeline",
    Defaults(num_inference_steps=28, guidance_scale=7.0, true_cfg_scale=None),
    denoiser="transformer",
    geometry=_geometry_sd3,
    published={"transformer": {"sample_size": 128, "pos_embed_max_size": 192}, "vae": _vae(16)},
    max_sequence_length=256,
    encode=_encode_sd3,
    embed_shapes=lambda config, tokens: {
        "prompt_embeds": (1, CLIP_TOKENS + tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, config["pooled_projection_dim"]),
    },
    unscale=_unscale,
)

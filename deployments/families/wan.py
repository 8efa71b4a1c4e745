"""Wan text-to-video: classifier-free guidance by two forwards a step; latents [B, C, F, H, W]."""

from math import lcm
from typing import TYPE_CHECKING

from deployments.families.family import Defaults, Embeds, Family, Pipeline, Shape, unscale_normalized
from deployments.families.geometry import Configs, Geometry
from deployments.request import MediaSize, Prompt

if TYPE_CHECKING:
    import torch


def _encode(pipe: Pipeline, prompt: Prompt, max_sequence_length: int | None) -> Embeds:
    embeds, negative = pipe.encode_prompt(
        prompt.text,
        prompt.negative_text,
        do_classifier_free_guidance=prompt.is_guided,
        max_sequence_length=max_sequence_length,
    )
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def _unscale(pipe: Pipeline, latents: "torch.Tensor", _height: int, _width: int) -> "torch.Tensor":
    return unscale_normalized(pipe, latents)


def _geometry(configs: Configs) -> Geometry:
    """The size by default is that of the pipeline's `__call__`; so is 16, by its `check_inputs`."""
    transformer, vae = configs["transformer"], configs["vae"]
    factor, stride = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    _, *patch = transformer.get("patch_size", (1, 2, 2))
    return Geometry(
        *(832, 480),
        size_multiple=lcm(16, *(factor * side for side in patch)),
        latent_pixels=factor,
        latent_channels=vae.get("z_dim", 16),
        num_frames=81,
        frame_stride=stride,
        max_side=transformer.get("rope_max_seq_len", 1024) * factor * min(patch),
    )


def _latents_shape(of: Geometry, size: MediaSize) -> Shape:
    num_frames = (size.num_frames - 1) // of.frame_stride + 1
    return 1, of.latent_channels, num_frames, size.height // of.latent_pixels, size.width // of.latent_pixels


WAN = Family(
    name="wan",
    pipeline_class="WanPipeline",
    denoiser="transformer",
    media="video",
    geometry=_geometry,
    published={"transformer": {}, "vae": {}},
    defaults=Defaults(num_inference_steps=50, guidance_scale=5.0, true_cfg_scale=None, fps=16),
    guidance="guidance_scale",
    needs_negative_prompt=False,
    max_sequence_length=512,
    encode=_encode,
    embed_shapes=lambda config, tokens: {"prompt_embeds": (1, tokens, config["text_dim"])},
    call=lambda request: {"guidance_scale": request.guidance_scale, "num_frames": request.num_frames},
    unscale=_unscale,
    latents_shape=_latents_shape,
)

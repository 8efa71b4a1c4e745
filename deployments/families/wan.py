"""Wan 2.1 text-to-video: classifier-free guidance by two forwards a step; latents [B, 16, F, H, W]."""

from typing import TYPE_CHECKING

from deployments.families.family import Defaults, Embeds, Family, Pipeline, Shape, unscale_normalized
from deployments.request import GenerationRequest, Prompt

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


def _latents_shape(pipe: Pipeline, request: GenerationRequest) -> Shape:
    num_frames = (request.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    factor = pipe.vae_scale_factor_spatial
    return 1, pipe.vae.config.z_dim, num_frames, request.height // factor, request.width // factor


WAN = Family(
    name="wan",
    pipeline_class="WanPipeline",
    denoiser="transformer",
    media="video",
    size_multiple=16,
    frame_stride=4,
    defaults=Defaults(
        832, 480, num_inference_steps=50, guidance_scale=5.0, true_cfg_scale=None, num_frames=81, fps=16
    ),
    guidance="guidance_scale",
    needs_negative_prompt=False,
    max_sequence_length=512,
    encode=_encode,
    embed_shapes=lambda config, tokens: {"prompt_embeds": (1, tokens, config["text_dim"])},
    call=lambda request: {"guidance_scale": request.guidance_scale, "num_frames": request.num_frames},
    unscale=_unscale,
    latents_shape=_latents_shape,
)

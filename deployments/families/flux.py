"""FLUX.1: guidance is distilled into the model; a negative prompt and true_cfg_scale > 1 add a pass."""

from typing import TYPE_CHECKING

from deployments.families.family import Defaults, Embeds, Family, Pipeline, packed_shape, unscale_kl
from deployments.request import Prompt

if TYPE_CHECKING:
    import torch


def _encode(pipe: Pipeline, prompt: Prompt, max_sequence_length: int | None) -> Embeds:
    def one(text: str) -> "tuple[torch.Tensor, torch.Tensor]":
        embeds, pooled, _ids = pipe.encode_prompt(
            prompt=text, prompt_2=None, max_sequence_length=max_sequence_length
        )
        return embeds, pooled

    embeds, pooled = one(prompt.text)
    result: dict[str, torch.Tensor | None] = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if prompt.is_guided and prompt.negative_text is not None:
        embeds, pooled = one(prompt.negative_text)
        result |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
    return result


def _unscale(pipe: Pipeline, latents: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    return unscale_kl(pipe, pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor))


FLUX = Family(
    name="flux",
    pipeline_class="FluxPipeline",
    denoiser="transformer",
    media="image",
    size_multiple=16,
    frame_stride=1,
    defaults=Defaults(1024, 1024, num_inference_steps=28, guidance_scale=3.5, true_cfg_scale=1.0),
    guidance="true_cfg_scale",
    needs_negative_prompt=True,
    max_sequence_length=512,
    encode=_encode,
    embed_shapes=lambda config, tokens: {
        "prompt_embeds": (1, tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, config["pooled_projection_dim"]),
    },
    call=lambda request: {
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
    },
    unscale=_unscale,
    latents_shape=lambda pipe, request: packed_shape(pipe, pipe.vae.config.latent_channels, request),
)

"""FLUX.1: guidance is distilled into the model; a negative prompt and true_cfg_scale > 1 add a pass."""

from typing import TYPE_CHECKING

from deployments.families.family import Defaults, Embeds, Family, Pipeline, packed_shape, unscale_kl
from deployments.families.geometry import Configs, Geometry, blocks_factor
from deployments.request import Prompt

if TYPE_CHECKING:
    import torch

DEFAULT_SAMPLE_SIZE = 128
"""Latents each way; `default_sample_size` of the pipeline."""


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


def _geometry(configs: Configs) -> Geometry:
    factor, vae = blocks_factor(configs["vae"]), configs["vae"]
    side = DEFAULT_SAMPLE_SIZE * factor
    return Geometry(side, side, 2 * factor, factor, vae.get("latent_channels", 4))


FLUX = Family(
    name="flux",
    pipeline_class="FluxPipeline",
    denoiser="transformer",
    media="image",
    geometry=_geometry,
    published={"vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}},
    defaults=Defaults(num_inference_steps=28, guidance_scale=3.5, true_cfg_scale=1.0),
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
    latents_shape=packed_shape,
)

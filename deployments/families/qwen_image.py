"""Qwen-Image: guidance by true_cfg_scale and a negative prompt, two forwards a step."""

from typing import TYPE_CHECKING

from deployments.families.family import Defaults, Embeds, Family, Pipeline, packed_shape, unscale_normalized
from deployments.families.flux import DEFAULT_SAMPLE_SIZE
from deployments.families.geometry import Configs, Geometry
from deployments.request import Prompt

if TYPE_CHECKING:
    import torch


def _encode(pipe: Pipeline, prompt: Prompt, max_sequence_length: int | None) -> Embeds:
    embeds, mask = pipe.encode_prompt(prompt.text, max_sequence_length=max_sequence_length)
    result = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    if prompt.is_guided and prompt.negative_text is not None:
        embeds, mask = pipe.encode_prompt(prompt.negative_text, max_sequence_length=max_sequence_length)
        result |= {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}
    return result


def _unscale(pipe: Pipeline, latents: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    return unscale_normalized(pipe, pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor))


def _geometry(configs: Configs) -> Geometry:
    vae = configs["vae"]
    factor = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
    side = DEFAULT_SAMPLE_SIZE * factor
    return Geometry(side, side, 2 * factor, factor, vae.get("z_dim", 16))


QWEN_IMAGE = Family(
    name="qwen-image",
    pipeline_class="QwenImagePipeline",
    denoiser="transformer",
    media="image",
    geometry=_geometry,
    published={"vae": {}},
    defaults=Defaults(num_inference_steps=50, guidance_scale=None, true_cfg_scale=4.0),
    guidance="true_cfg_scale",
    needs_negative_prompt=True,
    max_sequence_length=512,
    encode=_encode,
    embed_shapes=lambda config, tokens: {"prompt_embeds": (1, tokens, config["joint_attention_dim"])},
    call=lambda request: {"true_cfg_scale": request.true_cfg_scale, "guidance_scale": request.guidance_scale},
    unscale=_unscale,
    latents_shape=packed_shape,
)

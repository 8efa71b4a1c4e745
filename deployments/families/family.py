"""What is particular to one architecture. Everything else is said once, for all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deployments.families.geometry import Configs, Geometry
from deployments.memory.config import Dtype
from deployments.request import GenerationRequest, MediaSize, Prompt

if TYPE_CHECKING:
    import torch

Embeds = Mapping[str, "torch.Tensor | None"]
Shape = tuple[int, ...]
Pipeline = Any
"""A `diffusers.DiffusionPipeline`, some of whose components are None."""


@dataclass(frozen=True)
class Defaults:
    """What a request that says nothing gets beside its size: the defaults of the pipeline's `__call__`."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None = None
    fps: int = 16


@dataclass(frozen=True)
class Family:
    """One architecture: how its text is encoded, its pipeline called, its latents made ready for the VAE."""

    name: str
    pipeline_class: str
    """`_class_name` in a checkpoint's model_index.json."""
    denoiser: Literal["transformer", "unet"]
    media: Literal["image", "video"]
    geometry: Callable[[Configs], Geometry]
    """As the pipeline computes it from its components' configs. Raises ValueError."""
    published: Configs
    """Of the published model, what `geometry` reads: for whoever cannot read the checkpoint."""
    defaults: Defaults
    guidance: Literal["guidance_scale", "true_cfg_scale"]
    """Which field scales classifier-free guidance (two forward passes); above 1 it is on."""
    needs_negative_prompt: bool
    """Whether guidance is on only when a negative prompt is given."""
    max_sequence_length: int | None
    """Text tokens per prompt, as in the pipeline's `__call__`; None where the tokenizer alone decides."""
    encode: Callable[[Pipeline, Prompt, int | None], Embeds]
    """(pipeline with only text encoders, prompt, max_sequence_length) -> keyword arguments of the call."""
    embed_shapes: Callable[[Mapping[str, Any], int], Mapping[str, tuple[int, ...]]]
    """(denoiser's config, text tokens) -> shapes of what `encode` returns for a prompt without a negative one."""
    call: Callable[[GenerationRequest], Mapping[str, Any]]
    """Keyword arguments of the pipeline's call that only this family has."""
    unscale: "Callable[[Pipeline, torch.Tensor, int, int], torch.Tensor]"
    """(pipeline with only a VAE, latents, height, width) -> what `vae.decode` takes."""
    latents_shape: Callable[[Geometry, MediaSize], Shape]
    """Of the latents that the denoiser's pipeline returns."""
    upcasts_vae: bool = False
    """Whether the pipeline decodes in float32 where the VAE is in float16 and its config has `force_upcast`."""

    def vae_dtype(self, dtype: Dtype, vae_config: Mapping[str, Any]) -> Dtype:
        """What the pipeline decodes in where the VAE is loaded in this one."""
        upcasts = self.upcasts_vae and dtype == "float16" and vae_config.get("force_upcast")
        return "float32" if upcasts else dtype

    def is_guided(self, guidance_scale: float | None, true_cfg_scale: float | None, negative: bool) -> bool:
        """Whether the pipeline will run a second, unconditional pass."""
        scale = guidance_scale if self.guidance == "guidance_scale" else true_cfg_scale
        return scale is not None and scale > 1 and (negative or not self.needs_negative_prompt)


def packed_shape(of: Geometry, size: MediaSize) -> Shape:
    """Of latents in patches of 2 x 2, [B, H / 2 * W / 2, 4 * C]. Source: `_pack_latents` of the pipelines."""
    patch = 2 * of.latent_pixels
    return 1, size.height // patch * (size.width // patch), 4 * of.latent_channels


def unscale_kl(pipe: Pipeline, latents: "torch.Tensor") -> "torch.Tensor":
    """Undo AutoencoderKL's scaling. Formula: `decode_latents` of the diffusers pipelines."""
    config = pipe.vae.config
    latents = latents / config.scaling_factor
    shift = config.get("shift_factor")
    return latents if shift is None else latents + shift


def unscale_normalized(pipe: Pipeline, latents: "torch.Tensor") -> "torch.Tensor":
    """Undo the per-channel normalisation of the 3-D VAEs; latents [B, C, F, H, W].

    Written `z / (1 / std) + mean`, as the pipelines do: `z * std + mean` rounds differently.
    """
    config = pipe.vae.config
    mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return latents / (1.0 / std) + mean

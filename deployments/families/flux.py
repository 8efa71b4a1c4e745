"""FLUX.1: guidance is distilled into the model; a negative prompt and true_cfg_scale > 1 add a pass."""

from deployments.families.family import Defaults, Family
from deployments.families.geometry import Configs, Geometry, blocks_factor

DEFAULT_SAMPLE_SIZE = 128
"""Latents each way; `default_sample_size` of the pipeline."""


def _geometry(configs: Configs) -> Geometry:
    factor, vae = blocks_factor(configs["vae"]), configs["vae"]
    side = DEFAULT_SAMPLE_SIZE * factor
    return Geometry(side, side, 2 * factor, factor, vae.get("latent_channels", 4))


FLUX = Family(
    name="flux",
    pipeline_class="FluxPipeline",
    media="image",
    geometry=_geometry,
    published={"vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}},
    defaults=Defaults(num_inference_steps=28, guidance_scale=3.5, true_cfg_scale=1.0),
    guidance="true_cfg_scale",
    needs_negative_prompt=True,
    max_sequence_length=512,
)

"""FLUX.1: guidance is distilled into the model; a negative prompt and true_cfg_scale > 1 add a pass."""

from deployments.families.family import Family
from deployments.families.geometry import Configs, Geometry, blocks_factor
from deployments.options.step_cache import StepCacheConfig, TiersConfig

DEFAULT_SAMPLE_SIZE = 128
"""Default width and height in latents: `default_sample_size` of the pipeline."""


def _geometry(configs: Configs) -> Geometry:
    factor, vae = blocks_factor(configs["vae"]), configs["vae"]
    side = DEFAULT_SAMPLE_SIZE * factor
    return Geometry(side, side, 2 * factor, factor, vae.get("latent_channels", 4))


FLUX = Family(
    name="flux",
    pipeline_class="FluxPipeline",
    geometry=_geometry,
    published={"vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}},
    tiers=TiersConfig(medium=StepCacheConfig(interval=3), low=StepCacheConfig(interval=6)),
)

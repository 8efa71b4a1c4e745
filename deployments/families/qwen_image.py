"""Qwen-Image: guidance by true_cfg_scale and a negative prompt, with two forwards per step."""

from deployments.families.family import Family
from deployments.families.flux import DEFAULT_SAMPLE_SIZE
from deployments.families.geometry import Configs, Geometry


def _geometry(configs: Configs) -> Geometry:
    vae = configs["vae"]
    factor = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
    side = DEFAULT_SAMPLE_SIZE * factor
    return Geometry(side, side, 2 * factor, factor, vae.get("z_dim", 16))


QWEN_IMAGE = Family(
    name="qwen-image",
    pipeline_class="QwenImagePipeline",
    geometry=_geometry,
    published={"vae": {}},
)

"""Wan text-to-video: classifier-free guidance by two forwards per step; latents [B, C, F, H, W]."""

from math import lcm

from deployments.families.family import Family
from deployments.families.geometry import Configs, Geometry


def _geometry(configs: Configs) -> Geometry:
    """The default size is that of the pipeline's `__call__`; the multiple 16 is that of its `check_inputs`."""
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
        frame_multiple=stride,
        max_side=transformer.get("rope_max_seq_len", 1024) * factor * min(patch),
    )


WAN = Family(
    name="wan",
    pipeline_class="WanPipeline",
    geometry=_geometry,
    published={"transformer": {}, "vae": {}},
)

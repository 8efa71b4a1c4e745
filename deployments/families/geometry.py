"""Computes the sizes that a checkpoint makes from its configs, as its pipeline does, but without torch.

A config.json may leave out values that equal its class's defaults; this module repeats those defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

Config = Mapping[str, Any]
"""One component's config.json."""
Configs = Mapping[str, Config]
"""A checkpoint's models by component name."""

_BLOCKS = {
    "AutoencoderKL": ("block_out_channels", 1),
    "AutoencoderTiny": ("decoder_block_out_channels", 4),
    "AsymmetricAutoencoderKL": ("up_block_out_channels", 1),
    "ConsistencyDecoderVAE": ("encoder_block_out_channels", 4),
}
"""By VAE class: (key of the config that stands for `block_out_channels`, default number of blocks)."""
_LEAST_SAMPLE_SIZE = 64
"""Least size of a UNet that was saved before diffusers 0.9. Source: `StableDiffusionPipeline.__init__`."""


@dataclass(frozen=True)
class Geometry:
    """The default size of one checkpoint, and the sizes that requests may ask for."""

    width: int | None
    """Width of a request that does not set it, in pixels; None: the checkpoint has no default."""
    height: int | None
    size_multiple: int
    """Width and height must be multiples of this: the pipeline refuses other sizes, or silently rounds them."""
    latent_pixels: int
    """Pixels per latent position in each direction: the VAE's factor."""
    latent_channels: int
    """Channels of the latents that the VAE decodes."""
    num_frames: int = 1
    frame_stride: int = 1
    """Frames per latent frame."""
    frame_multiple: int = 1
    """num_frames must be 1 more than a multiple of this: some VAEs make latent frames in pairs."""
    frames_per_decode: int | None = None
    """For videos with an image VAE: number of frames that the pipeline decodes at once."""
    sizes: Sequence[Sequence[int]] = ()
    """All allowed (width, height), if the pipeline only makes certain sizes; empty: any."""
    max_side: int | None = None
    """Most pixels in each direction that the denoiser has positions for; None: any."""

    def __post_init__(self) -> None:
        """Raises ValueError if a number is not a positive integer."""
        for name, value in vars(self).items():
            is_unsaid = value is None and name in ("width", "height", "max_side", "frames_per_decode")
            if name != "sizes" and not is_unsaid and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} would be {value!r}, but must be 1 or more")


def blocks_factor(vae: Config) -> int:
    """Returns `vae_scale_factor` of pipelines whose VAE halves an image between its blocks. Raises ValueError."""
    name = vae.get("_class_name", "AutoencoderKL")
    key, num_default = _BLOCKS.get(name, ("block_out_channels", 0))
    num_blocks = len(vae[key]) if vae.get(key) else num_default
    if not num_blocks:
        raise ValueError(f"the vae is a {name}, whose config has no {key}: its scale factor is not known")
    return 1 << num_blocks - 1


def sample_sides(sample_size: int | Sequence[int] | None, factor: int) -> tuple[int | None, int | None]:
    """Returns (width, height) in pixels for a denoiser's `sample_size`: latents, one number or [height, width]."""
    if sample_size is None:
        return None, None
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return width * factor, height * factor


def unet_sample_size(unet: Config) -> int | Sequence[int] | None:
    """Returns a UNet's sample size as `StableDiffusionPipeline` reads it."""
    size: int | Sequence[int] | None = unet.get("sample_size")
    saved_by = Version(Version(unet.get("_diffusers_version", "1")).base_version)
    if isinstance(size, int) and saved_by < Version("0.9.0.dev0"):
        return max(size, _LEAST_SAMPLE_SIZE)
    return size

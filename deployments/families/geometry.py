"""What sizes a checkpoint makes, told by its own configs: as its pipeline computes them, but without torch.

A config.json may leave out what is its class's default; those defaults are named here.
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
"""VAE class to (what its `config.block_out_channels` is, how many there are by default)."""
_LEAST_SAMPLE_SIZE = 64
"""Of a UNet that was saved before diffusers 0.9. Source: `StableDiffusionPipeline.__init__`."""


@dataclass(frozen=True)
class Geometry:
    """What one checkpoint draws by default, and what may be asked of it."""

    width: int | None
    """Of a request that says nothing, in pixels; None: the checkpoint does not say."""
    height: int | None
    size_multiple: int
    """Width and height must be multiples of this: the pipeline refuses other sizes, or silently rounds them."""
    latent_pixels: int
    """Pixels to a latent position, each way: the VAE's factor."""
    latent_channels: int
    """Of what the VAE decodes."""
    num_frames: int = 1
    frame_stride: int = 1
    """Frames to a latent one."""
    frame_multiple: int = 1
    """num_frames must be 1 more than a multiple of this: some VAEs make latent frames by twos."""
    frames_per_decode: int | None = None
    """Of a video whose VAE knows no time: how many frames the pipeline has it decode at once."""
    sizes: Sequence[Sequence[int]] = ()
    """(width, height) of all that may be asked for, where the pipeline chooses by itself; none: any."""
    max_side: int | None = None
    """Pixels each way that the denoiser has positions for; None: any."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name, value in vars(self).items():
            is_unsaid = value is None and name in ("width", "height", "max_side", "frames_per_decode")
            if name != "sizes" and not is_unsaid and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} comes to {value!r}, and must be 1 or more")


def blocks_factor(vae: Config) -> int:
    """`vae_scale_factor` of the pipelines whose VAE halves a picture between its blocks."""
    name = vae.get("_class_name", "AutoencoderKL")
    key, num_default = _BLOCKS.get(name, ("block_out_channels", 0))
    num_blocks = len(vae[key]) if vae.get(key) else num_default
    if not num_blocks:
        raise ValueError(f"the vae is a {name}, whose config has no {key}: its scale factor is not known")
    return 1 << num_blocks - 1


def sample_sides(sample_size: int | Sequence[int] | None, factor: int) -> tuple[int | None, int | None]:
    """(width, height) in pixels, of a denoiser's `sample_size`: one for both, or [height, width], in latents."""
    if sample_size is None:
        return None, None
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return width * factor, height * factor


def unet_sample_size(unet: Config) -> int | Sequence[int] | None:
    """As `StableDiffusionPipeline` reads it."""
    size: int | Sequence[int] | None = unet.get("sample_size")
    saved_by = Version(Version(unet.get("_diffusers_version", "1")).base_version)
    if isinstance(size, int) and saved_by < Version("0.9.0.dev0"):
        return max(size, _LEAST_SAMPLE_SIZE)
    return size

"""What travels between the stages: one frozen dataclass per hop. Torch is named here, never imported.

Prompt --> encoder --> Conditioning --> transformer --> Denoised, and the latents --> VAE --> Media

The latents are a bare tensor, handed on by reference; a GenerationRequest goes with each call. Beside it,
StreamOptions say what the caller wants to hear on the way: Progress, and a PartialDenoised before the latents of
each partial picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

OutputFormat = Literal["png", "jpeg", "webp", "mp4"]


@dataclass(frozen=True)
class Prompt:
    """All that determines an embedding for a given checkpoint: the encoder's argument and its cache's key."""

    text: str
    negative_text: str | None
    is_guided: bool
    """Whether a negative (or empty) prompt is to be encoded as well."""


@dataclass(frozen=True, order=True)
class MediaSize:
    """Of a picture or video that is asked for."""

    width: int
    height: int
    num_frames: int = 1

    def __str__(self) -> str:
        frames = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.width}x{self.height}{frames}"


@dataclass(frozen=True)
class GenerationRequest:
    """One picture or video, every default filled in. Sizes are in pixels."""

    prompt: Prompt
    width: int
    height: int
    num_frames: int
    """1 for a picture."""
    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    seed: int
    output_format: OutputFormat
    output_compression: int
    """Quality from 0 to 100 for JPEG and WebP (100: lossless WebP); PNG and MP4 ignore it."""
    fps: int

    @property
    def size(self) -> MediaSize:
        return MediaSize(self.width, self.height, self.num_frames)


@dataclass(frozen=True)
class Conditioning:
    """The encoder's answer."""

    embeds: "Mapping[str, torch.Tensor | None]"
    """CPU tensors, named as the pipeline's call spells them: `prompt_embeds` [1, S, D], and so on."""
    encode_ms: float


@dataclass(frozen=True)
class StreamOptions:
    """What the caller wants to hear before the picture."""

    wants_progress: bool = False
    num_partial_images: int = 0
    """At most so many; fewer if there are too few steps, or the picture is done first."""


NO_NEWS = StreamOptions()


@dataclass(frozen=True)
class Progress:
    """`step` of `num_steps` are done, as the request counts them; in the decode phase, all."""

    step: int
    num_steps: int
    eta_s: float | None
    """Time left until the last step, going by this request's own steps; None before the first."""
    phase: Literal["denoise", "decode"] = "denoise"


@dataclass(frozen=True)
class PartialDenoised:
    """The latents of partial picture `partial_image_index` follow, by reference."""

    partial_image_index: int


@dataclass(frozen=True)
class Denoised:
    """What the ingress learns of a finished denoise; the latents follow it, by reference."""

    encode_ms: float
    queue_ms: float
    """From the arrival in the replica to the start of the loop."""
    denoise_ms: float


@dataclass(frozen=True)
class Media:
    """An encoded picture or video."""

    data: bytes
    media_type: str
    decode_ms: float

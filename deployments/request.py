"""What travels between the stages: one frozen dataclass per hop. Torch is named here, never imported.

encoder --> Conditioning --> transformer --> Denoised, and DecodeArguments --> VAE --> Media
                 |               ^
                 +--> VAE --> Prepared        where pictures go in

What is to be decoded is handed on by reference, as are InputPictures; a GenerationRequest goes with each call.
Beside it, StreamOptions say what the caller wants to hear on the way: Progress, and a PartialDenoised before what
is to be decoded for each partial picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.adapter import ScaledAdapter
from deployments.step_cache import Quality, StepCacheConfig

OutputFormat = Literal["png", "jpeg", "webp", "mp4"]
CallKind = Literal["generate", "edit", "inpaint", "image_to_video", "video_to_video"]
"""From text alone; from pictures; of a picture what a mask says; a video from its first frame; from a video."""


@dataclass(frozen=True)
class Prompt:
    """The texts of a request."""

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
    kind: CallKind = "generate"
    strength: float | None = None
    """Of kinds that draw a picture anew, from 0 to 1: how much of it."""
    control_scale: float | None = None
    """Of pipelines with a ControlNet: how loud it is."""
    guidance_scale_2: float | None = None
    """Of the expert for low noise, where there are two; None: as of the other."""
    quality: Quality | None = "high"
    """The tier that was asked for; None: none, but a step cache of the request's own."""
    step_cache: StepCacheConfig | None = None
    """None: every step computes its predictions."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """LoRA's, whose terms add up."""

    @property
    def size(self) -> MediaSize:
        return MediaSize(self.width, self.height, self.num_frames)


@dataclass(frozen=True)
class InputPictures:
    """What goes in beside the prompt: PNG, JPEG or WebP files, bounded and of these formats by who took them."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    """As large as the first of `images`. What is transparent is drawn anew; without an alpha channel, white."""
    control: bytes | None = None
    """Says where things are: edges, depths, poses, as the checkpoint's ControlNet was trained on."""
    video: bytes | None = None
    """MP4 or WebM, which has as many frames as the request asks for, or more."""
    field: str = "image"
    """What the client calls the images, or the video."""


Encodings = tuple[tuple[str, Any], ...]
"""In the order of the pipeline's call: (name of its encoding method, what that returned). Tensors lie in tuples,
lists and dicts, beside plain values."""


@dataclass(frozen=True)
class Conditioning:
    """The encoder's answer."""

    encodings: Encodings
    """Tensors are on the CPU."""
    encode_ms: float


Posterior = tuple[Literal["parameters", "latent"], Any, bool]
"""Of what `vae.encode` returned this tensor, on the CPU; and whether its channels lay last in memory."""
Posteriors = tuple[Posterior, ...]
"""In the order of the pipeline's calls."""


@dataclass(frozen=True)
class Prepared:
    """The VAE's answer for the pictures that go in."""

    posteriors: Posteriors
    prepare_ms: float


NOTHING_PREPARED = Prepared((), 0.0)
"""Where no pictures go in."""


@dataclass(frozen=True, eq=False)
class DecodeArguments:
    """What the pipeline passes to `vae.decode`: latents, already unscaled, [B, C, H, W] or [B, C, F, H, W]."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_channels_last: bool = False
    """How the latents lay in memory, which decides how a VAE's convolutions round."""
    more: tuple["DecodeArguments", ...] = ()
    """Of a video that is decoded in several calls: of those after the first."""
    sound: "DecodeArguments | None" = None
    """What it passes to `audio_vae.decode`; None: a video without sound, or a picture."""

    @classmethod
    def of(cls, latents: Any) -> "DecodeArguments":
        """Latents alone, as of most pipelines."""
        return cls((latents,), {})

    @property
    def latents(self) -> Any:
        """The first of them."""
        return self.args[0]

    @property
    def calls(self) -> tuple["DecodeArguments", ...]:
        """All of `vae.decode`, in their order."""
        return self, *self.more

    @property
    def values(self) -> tuple[Any, ...]:
        """All that is passed, for the sound too."""
        sound = () if self.sound is None else self.sound.values
        return (*((call.args, call.kwargs) for call in self.calls), *sound)

    @property
    def nbytes(self) -> int:
        return num_bytes(self.values)


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of what a replica decodes, for another: calls of the VAE's decoder, in their order."""

    calls: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]
    """(args, kwargs), on the CPU; of a video's VAE that has frame after frame, one call for each."""
    num_features: int | None
    """Entries of the cache that those calls share, where they do."""
    is_channels_last: bool


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
    """What is to be decoded for partial picture `partial_image_index` follows, by reference."""

    partial_image_index: int


@dataclass(frozen=True)
class ForwardCounts:
    """Of a request's forwards of its denoisers."""

    computed: int
    asked: int
    """By the pipeline; those that were not computed, a step cache has extrapolated."""


@dataclass(frozen=True)
class Denoised:
    """What the ingress learns of a finished denoise; what is to be decoded follows it, by reference."""

    encode_ms: float
    prepare_ms: float
    """0 where no pictures go in."""
    queue_ms: float
    """From the arrival in the replica to the start of the loop."""
    denoise_ms: float
    forwards: ForwardCounts


@dataclass(frozen=True)
class Media:
    """An encoded picture or video."""

    data: bytes
    media_type: str
    decode_ms: float


def num_bytes(value: Any) -> int:
    """Of all tensors in what pipelines pass about: in tuples, lists and dicts, beside plain values."""
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(num_bytes, value))
    return int(getattr(value, "nbytes", 0))

"""Requests to the stages: one image or video, its input images, and the events that the caller wants. Torch-free.

Each call has a GenerationRequest; InputPictures are passed on by reference.
"""

from dataclasses import dataclass
from typing import Literal

from deployments.options.adapter import ScaledAdapter
from deployments.options.step_cache import Quality, StepCacheConfig

OutputFormat = Literal["png", "jpeg", "webp", "mp4"]
CallKind = Literal["generate", "edit", "inpaint", "image_to_video", "video_to_video"]
"""
generate: from text only.
edit: from images.
inpaint: the masked part of an image.
image_to_video: from the first frame.
video_to_video: from a video.
"""


@dataclass(frozen=True)
class Prompt:
    """The texts of a request."""

    text: str
    negative_text: str | None
    is_guided: bool
    """Whether a negative (or empty) prompt is to be encoded as well."""
    is_weighted: bool = False
    """Whether `(word)1.3` weights a word, and texts may be longer than their encoders read at once."""


@dataclass(frozen=True, order=True)
class MediaSize:
    """Size of the image or video to make, in pixels."""

    width: int
    height: int
    num_frames: int = 1

    def __str__(self) -> str:
        frames = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.width}x{self.height}{frames}"


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one image or video, with all defaults filled in. Sizes are in pixels."""

    prompt: Prompt
    width: int
    height: int
    num_frames: int
    """1 for an image."""
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
    """How much of the input image is drawn anew, from 0 to 1, for kinds that have an input image."""
    control_scale: float | None = None
    """Weight of the ControlNet, if the pipeline has one."""
    guidance_scale_2: float | None = None
    """Guidance scale of the low-noise expert, if there are two experts; None: `guidance_scale`."""
    quality: Quality | None = "high"
    """The quality tier that was requested; None: the request has its own step cache instead."""
    step_cache: StepCacheConfig | None = None
    """None: every step computes its predictions."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """LoRA adapters, whose terms add up."""
    scheduler: str | None = None
    """One of `model.schedulers`; None: the checkpoint's own."""
    model: str | None = None
    """The served model that is requested; None: the only model that the stages have."""

    @property
    def size(self) -> MediaSize:
        return MediaSize(self.width, self.height, self.num_frames)

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames."""
        return self.width * self.height * self.num_frames

    @property
    def megapixel_steps(self) -> float:
        """The request's cost: pixels times frames times steps, in millions."""
        return self.width * self.height * self.num_frames * self.num_inference_steps / 10**6


@dataclass(frozen=True)
class InputPictures:
    """A request's inputs besides the prompt: PNG, JPEG or WebP files. The receiver has checked size and format."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    """Has the size of the first of `images`. Transparent pixels are drawn anew; without alpha, white ones."""
    control: bytes | None = None
    """Control image for the checkpoint's ControlNet: edges, depths or poses, as it was trained on."""
    video: bytes | None = None
    """MP4 or WebM with at least as many frames as the request asks for."""
    field: str = "image"
    """The client's name of the field with the images, or the video."""


@dataclass(frozen=True)
class StreamOptions:
    """Which events the caller wants before the result."""

    wants_progress: bool = False
    num_partial_images: int = 0
    """Most partial images; fewer are sent if there are too few steps, or if the image is done first."""


NO_EVENTS = StreamOptions()

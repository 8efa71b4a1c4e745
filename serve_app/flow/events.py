"""The events of a request that its caller receives; the last event of each image is the finished image."""

from dataclasses import dataclass
from typing import Any

from deployments.answers import Denoised, ForwardCounts, Media, Progress
from deployments.options.step_cache import Quality
from deployments.request import GenerationRequest
from serve_app.flow.partials import PartialImage


@dataclass(frozen=True)
class Picture:
    """One finished image or video, and the time that each stage took."""

    media: Media
    request: GenerationRequest
    denoised: Denoised
    wake_ms: float = 0.0
    """Milliseconds that the request waited for its sleeping model to wake up."""

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def quality(self) -> Quality | None:
        """The tier in effect; None: the request has a step cache of its own."""
        forwards = self.denoised.forwards
        return "high" if forwards.computed == forwards.asked else self.request.quality

    @property
    def warnings(self) -> tuple[str, ...]:
        """The settings of the request that could have no effect."""
        return (*self.denoised.warnings, *step_cache_warnings(self.request, self.denoised.forwards))

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds per stage."""
        times = {
            "wake": self.wake_ms,
            "encode": self.denoised.encode_ms,
            "prepare": self.denoised.prepare_ms,
            "queue": self.denoised.queue_ms,
            "denoise": self.denoised.denoise_ms,
            "decode": self.media.decode_ms,
        }
        return {stage: round(ms, 2) for stage, ms in times.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """How the image was made, for answers."""
        return {
            "seed": self.seed,
            "timings_ms": self.timings_ms,
            "forwards": vars(self.denoised.forwards),
            "warnings": list(self.warnings),
        }


Payload = Progress | PartialImage | Picture


@dataclass(frozen=True)
class Event:
    """An event of image `index` of a request; the last one has a Picture."""

    index: int
    payload: Payload


def step_cache_warnings(request: GenerationRequest, forwards: ForwardCounts) -> tuple[str, ...]:
    """Returns a warning if the requested tier or step cache has changed nothing."""
    cache, quality = request.step_cache, request.quality
    if cache is None:
        if quality == "high":
            return ()
        return (
            f"quality: this model has no tier {quality}, so every step was computed: set model.tiers.{quality}",
        )
    if forwards.computed < forwards.asked:
        return ()
    field = "step_cache" if quality is None else "quality"
    return (
        f"{field}: nothing was reused in {request.num_inference_steps} steps, of which {cache.kind} computes the "
        f"first {cache.first_steps} and the last {cache.last_steps} in any case",
    )

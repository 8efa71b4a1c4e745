"""Diffusers' own pipeline call, for one request after another."""

import copy
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch

from deployments.engine.load import Denoiser
from deployments.engine.merge import Inputs
from deployments.engine.stand_in import StandIn
from deployments.families.family import Embeds, Family
from deployments.request import GenerationRequest
from deployments.stages.draws import Draws

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""As `callback_on_step_end`."""


class PipelineCall:
    """A checkpoint's pipeline over whatever answers its denoiser's forwards. Thread-safe.

    Every request has a shallow copy of the pipeline, and a scheduler of its own (schedulers keep their state in
    themselves). So every scheduler and guidance mode of diffusers works, and the result is the pipeline's.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser, family: Family) -> None:
        self._pipe, self._denoiser, self._family = pipe, denoiser, family
        self._parameters = frozenset(signature(type(pipe).__call__).parameters)

    def __str__(self) -> str:
        return f"{type(self._pipe).__name__} with {type(self._pipe.scheduler).__name__}"

    def run(
        self,
        embeds: Embeds,
        request: GenerationRequest,
        submit: Callable[[Inputs], Any],
        device: torch.device,
        *,
        draws: Draws | None = None,
        after_step: AfterStep | None = None,
    ) -> torch.Tensor:
        """The latents as the pipeline returns them.

        submit: answers a forward of the denoiser. draws: for schedulers that are given no generator.
        """
        pipe = copy.copy(self._pipe)
        pipe.scheduler = copy.deepcopy(self._pipe.scheduler)
        if draws is not None:
            pipe.scheduler.step = draws.within(pipe.scheduler.step)
        stand_in = StandIn(self._denoiser.skeleton, dtype=self._denoiser.dtype, device=device, submit=submit)
        setattr(pipe, self._denoiser.name, stand_in)
        latents: torch.Tensor = pipe(
            **{name: self._place(value, device) for name, value in embeds.items()},
            **self._family.call(request),
            **self._keep_size(request),
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
        )[0]
        return latents

    def blank_embeds(self, num_tokens: int, num_negative_tokens: int | None = None) -> dict[str, torch.Tensor]:
        """num_negative_tokens: of a guided prompt."""
        shapes = self._family.embed_shapes(self._denoiser.config, num_tokens)
        embeds = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if num_negative_tokens is None:
            return embeds
        negative = self.blank_embeds(num_negative_tokens)
        return embeds | {f"negative_{name}": value for name, value in negative.items()}

    def _keep_size(self, request: GenerationRequest) -> Mapping[str, Any]:
        """For pipelines that would choose another size near the one that is asked for (FLUX.1-Kontext)."""
        keep = {
            "max_area": request.width * request.height,
            "_auto_resize": False,
            "use_resolution_binning": False,
        }
        return {name: value for name, value in keep.items() if name in self._parameters}

    def _place(self, value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """Embeddings in the denoiser's dtype, masks in their own."""
        if value is None:
            return None
        return value.to(device, self._denoiser.dtype if value.is_floating_point() else value.dtype)

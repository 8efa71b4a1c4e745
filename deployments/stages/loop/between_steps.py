"""What a request does between its steps: it reports progress and partial images, and saves the journal."""

from collections.abc import Callable
from typing import Any

import torch

from deployments.engine.step_cache import StepCache
from deployments.request import GenerationRequest
from deployments.stages.loop.journal import Journal
from deployments.stages.loop.partial import PartialLatents

OnStep = Callable[[int, torch.Tensor], None]
"""(steps done, latents after them), called after every timestep: some schedulers have several per step."""


class BetweenSteps:
    """An AfterStep. Steps that another replica did before it died are not reported again."""

    def __init__(
        self,
        request: GenerationRequest,
        cache: StepCache,
        journal: Journal,
        on_step: OnStep,
        partials: PartialLatents | None,
    ) -> None:
        """partials: None if the request wants no partial images."""
        self._num_steps, self._cache, self._journal = request.num_inference_steps, cache, journal
        self._on_step, self._partials = on_step, partials

    def __call__(self, scheduler: Any, index: int, latents: torch.Tensor) -> None:
        num_done = _num_done(scheduler, index, self._num_steps)
        is_told = self._journal.is_replaying
        self._cache.after_step(scheduler, index)
        if not is_told:
            self._on_step(num_done, latents)
        if self._partials is not None:
            self._partials.after_step(scheduler, index, latents, is_told=is_told)
        # Last on purpose: events sent before a save are not sent again after a resume.
        self._journal.after_step(is_last=num_done >= self._num_steps)


def _num_done(scheduler: Any, index: int, num_inference_steps: int) -> int:
    """Returns how many of the request's steps are done after timestep `index`, as pipelines' progress bars count:
    PNDM and Heun have more timesteps than steps."""
    num_done: int = (index + 1 - len(scheduler.timesteps)) // scheduler.order + num_inference_steps
    return max(0, num_done)

"""Partial images: predictions of the result while a request runs."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from deployments.answers import DecodeArguments

OnPartialLatents = Callable[[int, torch.Tensor], None]
"""(partial_image_index, predicted final latents, scaled as the scheduler has them)"""


class PartialLatents:
    """Passes the predicted latents of a few steps of one request to `on_partial` while its loop runs."""

    def __init__(self, num_partial_images: int, on_partial: OnPartialLatents) -> None:
        self._num_partial_images, self._on_partial = num_partial_images, on_partial
        self._before: torch.Tensor | None = None
        self._begin: int | None = None
        """Index of the first timestep that runs; image-to-image skips those before it."""

    def after_step(self, scheduler: Any, index: int, latents: torch.Tensor, *, is_told: bool = False) -> None:
        """Called after timestep `index` of the scheduler, with the latents after it. is_told: another replica has
        already passed on what is due at this step."""
        if self._begin is None:
            self._begin = index
        num_done = index + 1 - self._begin
        steps = plan_partial_steps(len(scheduler.timesteps) - self._begin, self._num_partial_images)
        if num_done in steps and not is_told:
            assert self._before is not None
            self._on_partial(steps.index(num_done), predict_clean(scheduler, self._before, latents))
        self._before = latents if num_done + 1 in steps else None


def finished_partials(
    num_partial_images: int,
    on_partial: Callable[[int, DecodeArguments], None] | None,
    finish: Callable[[torch.Tensor], DecodeArguments],
) -> PartialLatents | None:
    """Returns a PartialLatents that passes each partial image's DecodeArguments to `on_partial`.

    finish: returns what the request would decode if it ended with these latents.
    """
    if on_partial is None:
        return None
    return PartialLatents(num_partial_images, lambda index, latents: on_partial(index, finish(latents)))


def plan_partial_steps(num_steps: int, num_partial_images: int) -> list[int]:
    """Returns the steps after which a partial image is due: evenly spaced, not after the first or the last."""
    wanted = range(1, num_partial_images + 1)
    return sorted({1 + (num_steps - 1) * i // (num_partial_images + 1) for i in wanted} - {1})


def predict_clean(scheduler: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Returns the predicted clean latents of a flow model, from those before and after its latest step.

    For other schedulers returns `after`. An Euler step goes from x to x' along v = (x' - x) / (sigma' - sigma),
    with any guidance included in v, and the straight line ends at x' - sigma' v. Formula:
    `FlowMatchEulerDiscreteScheduler.step`.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
        return after
    sigma, next_sigma = scheduler.sigmas[scheduler.step_index - 1], scheduler.sigmas[scheduler.step_index]
    velocity = (after.float() - before.float()) / (next_sigma - sigma)
    clean: torch.Tensor = after.float() - next_sigma * velocity
    return clean.to(after.dtype)

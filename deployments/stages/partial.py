"""Partial pictures: what a request that is under way is heading for."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

OnPartial = Callable[[int, torch.Tensor], None]
"""(partial_image_index, latents that the request is heading for, as its scheduler has them)"""


class PartialLatents:
    """Gives a few of one request's latents away while its loop runs."""

    def __init__(self, num_partial_images: int, on_partial: OnPartial) -> None:
        self._num_partial_images, self._on_partial = num_partial_images, on_partial
        self._before: torch.Tensor | None = None
        self._begin: int | None = None
        """The first timestep that is done: of a picture that is drawn anew, those before are left out."""

    def after_step(self, scheduler: Any, index: int, latents: torch.Tensor) -> None:
        """Called after timestep `index` of the scheduler's, with the latents after it."""
        if self._begin is None:
            self._begin = index
        num_done = index + 1 - self._begin
        steps = plan_partial_steps(len(scheduler.timesteps) - self._begin, self._num_partial_images)
        if num_done in steps:
            assert self._before is not None
            self._on_partial(steps.index(num_done), predict_clean(scheduler, self._before, latents))
        self._before = latents if num_done + 1 in steps else None


def plan_partial_steps(num_steps: int, num_partial_images: int) -> list[int]:
    """After how many steps a partial picture is due: evenly spaced, not after the first or the last."""
    wanted = range(1, num_partial_images + 1)
    return sorted({1 + (num_steps - 1) * i // (num_partial_images + 1) for i in wanted} - {1})


def predict_clean(scheduler: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The predicted clean latents of a flow model, from those before and after its latest step; else `after`.

    An Euler step goes from x to x' along v = (x' - x) / (sigma' - sigma), whatever guidance made of v, and the
    straight line ends at x' - sigma' v. Formula: `FlowMatchEulerDiscreteScheduler.step`.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
        return after
    sigma, next_sigma = scheduler.sigmas[scheduler.step_index - 1], scheduler.sigmas[scheduler.step_index]
    velocity = (after.float() - before.float()) / (next_sigma - sigma)
    clean: torch.Tensor = after.float() - next_sigma * velocity
    return clean.to(after.dtype)

"""Partial images: the steps at which they are due, and the latents that they show."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from deployments.stages.loop.partial import PartialLatents, plan_partial_steps, predict_clean


@pytest.mark.parametrize(
    ("num_steps", "num_partial_images", "steps"),
    [
        (28, 3, [7, 14, 21]),
        (12, 2, [4, 8]),
        (8, 1, [4]),
        (5, 3, [2, 3, 4]),
        (4, 3, [2, 3]),
        (3, 3, [2]),
        (2, 3, []),
        (1, 3, []),
        (28, 0, []),
    ],
)
def test_partial_steps_are_evenly_spaced_between_the_first_and_the_last(
    num_steps: int, num_partial_images: int, steps: list[int]
) -> None:
    assert plan_partial_steps(num_steps, num_partial_images) == steps


@pytest.mark.parametrize("num_steps", range(1, 60))
def test_no_partial_step_is_the_first_or_the_last(num_steps: int) -> None:
    for num_partial_images in range(4):
        steps = plan_partial_steps(num_steps, num_partial_images)
        assert len(steps) == min(num_partial_images, max(num_steps - 2, 0))
        assert set(steps) <= set(range(2, num_steps))


def test_the_clean_latents_lie_at_the_end_of_the_schedulers_own_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, generator=generator)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        velocity = torch.randn(latents.shape, generator=generator)
        [after] = scheduler.step(velocity, timestep, latents, return_dict=False)
        torch.testing.assert_close(predict_clean(scheduler, latents, after), latents - sigma * velocity)
        latents = after


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)]
)
def test_other_schedulers_give_the_latents_as_they_are(scheduler: object) -> None:
    before, after = torch.zeros(1, 4), torch.ones(1, 4)
    assert predict_clean(scheduler, before, after) is after


@pytest.mark.parametrize("begin", range(6))
def test_of_a_picture_that_is_drawn_anew_they_are_spaced_over_the_steps_that_are_done(begin: int) -> None:
    """The request's strength skips the first timesteps."""
    scheduler, steps = FlowMatchEulerDiscreteScheduler(), list[int]()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(begin)
    latents = torch.ones(1, 4)
    partials = PartialLatents(2, lambda _index, _latents: steps.append(scheduler.step_index - begin))
    for index, timestep in enumerate(scheduler.timesteps[begin:], begin):
        [latents] = scheduler.step(torch.ones(1, 4), timestep, latents, return_dict=False)
        partials.after_step(scheduler, index, latents)
    assert steps == plan_partial_steps(8 - begin, 2)

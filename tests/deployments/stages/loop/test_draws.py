"""A scheduler that draws noise draws as if the process had been seeded for this request alone."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from deployments.engine.passes import Pending
from deployments.request import GenerationRequest
from deployments.stages.loop.draws import Draws
from deployments.stages.loop.steps import watch_steps
from tests.deployments.variants import (
    build_request,
    denoise,
    draw_plain,
    draw_staged,
    encode,
    load_denoising,
    read_model,
    set_scheduler,
    write_tiny,
)

CPU = torch.device("cpu")
SDE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = [
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "stochastic_sampling": True}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("wan", "DPMSolverMultistepScheduler", {**SDE, "algorithm_type": "sde-dpmsolver++"}),
]


def test_draws_are_those_after_seeding_and_leave_the_process_as_it_was() -> None:
    draws = Draws(7, CPU)
    own = draws.within(lambda: (torch.randn(3), torch.randn_like(torch.zeros(2)), torch.randint(0, 99, (4,))))
    torch.manual_seed(7)
    expected = [own.__wrapped__() for _ in range(2)]  # type: ignore[attr-defined]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = [own() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


def test_whether_anything_was_drawn_is_known() -> None:
    draws = Draws(0, CPU)
    draws.within(lambda: torch.ones(3))()
    assert not draws.were_taken
    draws.within(lambda: torch.rand(1))()
    assert draws.were_taken


def test_others_draw_while_a_step_waits_for_its_prediction() -> None:
    scheduler, drawn = EulerAncestralDiscreteScheduler(), list[torch.Tensor]()
    scheduler.set_timesteps(2)
    latents = torch.ones(1, 4, 8, 8)

    with ThreadPoolExecutor(1) as others:

        def wait() -> torch.Tensor:
            drawn.append(others.submit(Draws(1, CPU).within(torch.rand), 1).result(timeout=10))
            return latents

        with watch_steps(scheduler, Draws(0, CPU), None):
            scheduler.step(Pending.of(wait), scheduler.timesteps[0], latents)
    assert len(drawn) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("family", "class_name", "config"), SCHEDULERS)
def test_the_same_seed_draws_what_plain_diffusers_draws_after_seeding_the_process(
    tmp_path: Path, family: str, class_name: str, config: Mapping[str, Any]
) -> None:
    folder = write_tiny(family, tmp_path / "x")
    set_scheduler(folder, class_name, **config)
    model = read_model(folder)
    request = build_request(model)
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(folder, request))


@pytest.mark.slow
def test_requests_at_the_same_time_draw_each_its_own(tmp_path: Path) -> None:
    folder = write_tiny("flux", tmp_path / "x")
    set_scheduler(folder, *SCHEDULERS[0][1:2], **SCHEDULERS[0][2])
    model = read_model(folder)
    stage = load_denoising(model)
    requests = [replace(build_request(model), seed=seed) for seed in (1, 2, 1, 3)]
    embeds = encode(model, requests[0])

    def draw(request: GenerationRequest) -> torch.Tensor:
        latents: torch.Tensor = denoise(stage, embeds, request).latents
        return latents

    alone = [draw(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, requests))
    stage.close()
    assert torch.equal(alone[0], alone[2])
    assert not torch.equal(alone[0], alone[1])
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)  # merged forwards round differently

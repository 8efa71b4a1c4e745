"""A scheduler that a request asks for draws what plain diffusers draws with `X.from_config(own.config)`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.errors import CannotServe, WrongField
from deployments.options.schedulers import SchedulerConfig
from deployments.options.step_cache import StepCacheConfig
from deployments.request import CallKind, GenerationRequest, InputPictures
from deployments.stages import load_stage
from deployments.stages.denoise import Denoising
from tests.deployments import plain
from tests.deployments.variants import build_request, denoise, encode, load_denoising, read_model
from tests.pictures import half_mask, picture, png
from tests.thorough import usually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # NumPy's, of KDPM2
]
STEPS = 6
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLUX = FLOW | {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
OFFERED: Mapping[str, Sequence[Any]] = {
    "sd15": [
        "DDIMScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        {
            "name": "karras",
            "class_name": "DPMSolverMultistepScheduler",
            "options": {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        },
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "SASolverScheduler",
        "IPNDMScheduler",
    ],
    "sdxl": ["PNDMScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "DDPMScheduler"],
    "flux": [
        {"class_name": "UniPCMultistepScheduler", "options": FLUX},
        {"class_name": "DPMSolverMultistepScheduler", "options": FLUX},
        "FlowMatchLCMScheduler",
    ],
    "sd3": [
        "FlowMatchHeunDiscreteScheduler",
        {"class_name": "DEISMultistepScheduler", "options": FLOW},
    ],
    "wan": ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"],
}


def offered(family: str) -> ModelConfig:
    folder = fetch_checkpoint(f"tiny://{family}", ())
    return read_model(folder, schedulers=[SchedulerConfig.model_validate(each) for each in OFFERED[family]])


PAIRS = [
    (family, SchedulerConfig.model_validate(each).asked_as)
    for family, each_of in OFFERED.items()
    for each in each_of
]
USUAL = {
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
"""Schedulers tested without --thorough: of one order, of several, and of two forwards a step, each with noise and
without."""
SECOND_ORDER = ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
OF_SD15 = usually([each for family, each in PAIRS if family == "sd15"], lambda each: each in SECOND_ORDER)


@pytest.fixture(scope="module")
def stage_of() -> Iterator[Callable[[str], Denoising]]:
    opened: dict[str, Denoising] = {}

    def open_stage(family: str) -> Denoising:
        if family not in opened:
            opened[family] = load_denoising(offered(family))
        return opened[family]

    yield open_stage
    for stage in opened.values():
        stage.close()


@cache
def plain_pipeline(family: str) -> DiffusionPipeline:
    return plain.load_plain(fetch_checkpoint(f"tiny://{family}", ()))


@torch.no_grad()
def draw_plain(model: ModelConfig, request: GenerationRequest) -> torch.Tensor:
    """Returns latents drawn by plain diffusers, with the scheduler replaced as its users do."""
    pipe: Any = plain_pipeline(model.architecture.name)
    own = pipe.scheduler
    try:
        for each in model.schedulers:
            if each.asked_as == request.scheduler:
                pipe.scheduler = getattr(diffusers, each.class_name).from_config(own.config, **each.options)
        torch.manual_seed(request.seed)
        size = {"height": request.height, "width": request.width}
        frames = {"num_frames": request.num_frames} if request.num_frames > 1 else {}
        return plain.latents_of(
            pipe,
            prompt=request.prompt.text,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator().manual_seed(request.seed),
            **size,
            **frames,
        )
    finally:
        pipe.scheduler = own


def asking(model: ModelConfig, scheduler: str | None, **changes: Any) -> GenerationRequest:
    return replace(build_request(model), scheduler=scheduler, num_inference_steps=STEPS, **changes)


@pytest.mark.parametrize(("family", "scheduler"), usually(PAIRS, lambda of: of[1] in USUAL))
def test_a_scheduler_draws_what_plain_diffusers_draws_with_it(
    stage_of: Callable[[str], Denoising], family: str, scheduler: str
) -> None:
    model = offered(family)
    request = asking(model, scheduler)
    latents = denoise(stage_of(family), encode(model, request), request).latents
    assert torch.equal(latents, draw_plain(model, request))
    assert not torch.equal(latents, draw_plain(model, replace(request, scheduler=None))), "the same as its own"


def test_requests_of_several_schedulers_fly_together_and_each_draws_its_own(
    stage_of: Callable[[str], Denoising],
) -> None:
    model, stage = offered("sd15"), stage_of("sd15")
    requests = [asking(model, each.asked_as, seed=seed) for seed, each in enumerate(model.schedulers)]
    encodings = encode(model, requests[0])
    before = sum(n for size, n in stage.stats().queue.batch_sizes.items() if size > 1)
    with ThreadPoolExecutor(len(requests)) as threads:
        made = list(threads.map(lambda request: denoise(stage, encodings, request).latents, requests))
    for request, latents in zip(requests, made, strict=True):
        expected = draw_plain(model, request)
        # Merged sums round differently, and DDIM's first steps amplify that; different images differ by about 1.
        torch.testing.assert_close(latents, expected, atol=5e-4 * float(expected.abs().max()), rtol=0)
    assert sum(n for size, n in stage.stats().queue.batch_sizes.items() if size > 1) > before, "nothing merged"


@pytest.mark.parametrize("scheduler", OF_SD15)
def test_progress_counts_steps_to_the_last_by_any_scheduler(
    stage_of: Callable[[str], Denoising], scheduler: str
) -> None:
    model, steps = offered("sd15"), list[int]()
    request = asking(model, scheduler)
    denoise(stage_of("sd15"), encode(model, request), request, on_step=lambda step, _latents: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1] == STEPS


@pytest.mark.parametrize("scheduler", OF_SD15)
def test_a_step_cache_reuses_by_any_scheduler(stage_of: Callable[[str], Denoising], scheduler: str) -> None:
    model, counts = offered("sd15"), list[Any]()
    request = asking(model, scheduler, step_cache=StepCacheConfig(interval=2, first_steps=1))
    encodings = encode(model, request)
    latents = denoise(stage_of("sd15"), encodings, request, on_forwards=counts.append).latents
    assert latents.isfinite().all()
    [count] = counts
    assert count.computed < count.asked


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        ("flux", "FlowMatchHeunDiscreteScheduler", "FluxPipeline cannot run with it: .*custom sigmas"),
        ("flux", "UniPCMultistepScheduler", "as epsilon, but the checkpoint's own FlowMatch.* as flow_prediction"),
        ("sd15", "FlowMatchEulerDiscreteScheduler", "it reads the model's predictions as flow_prediction"),
        (
            "sd15",
            {"class_name": "DDIMScheduler", "options": {"use_karras_sigmas": True}},
            "DDIMScheduler has no option use_karras_sigmas",
        ),
    ],
)
def test_what_its_pipeline_cannot_draw_with_is_refused_at_start(family: str, scheduler: Any, message: str) -> None:
    asked = SchedulerConfig.model_validate(scheduler)
    model = read_model(fetch_checkpoint(f"tiny://{family}", ()), schedulers=[asked])
    with pytest.raises(CannotServe, match=f"model.schedulers, {asked.class_name}: .*{message}"):
        load_stage("denoise", model, TransformerConfig())


def test_what_a_scheduler_cannot_do_is_the_requests_fault(stage_of: Callable[[str], Denoising]) -> None:
    """LCM takes no more than 50 steps."""
    model = offered("sd15")
    request = replace(asking(model, "LCMScheduler"), num_inference_steps=60)
    encodings = encode(model, replace(request, scheduler=None))
    with pytest.raises(WrongField, match="StableDiffusionPipeline with LCMScheduler does not take") as wrong:
        denoise(stage_of("sd15"), encodings, request)
    assert wrong.value.param == "num_inference_steps"


@pytest.mark.parametrize("kind", ["edit", "inpaint"])
def test_a_scheduler_that_cannot_begin_with_a_picture_is_the_requests_fault(
    stage_of: Callable[[str], Denoising], kind: CallKind
) -> None:
    """Flow pipelines call `scale_noise` of their scheduler, which this one lacks."""
    model, asked = offered("flux"), OFFERED["flux"][0]["class_name"]
    pictures = InputPictures((png(picture()),), png(half_mask()) if kind == "inpaint" else None)
    request = replace(build_request(model, kind), scheduler=asked)
    encodings = encode(model, request, pictures)
    posteriors = load_stage("decode", model, VaeConfig()).prepare(encodings, request, pictures)
    with pytest.raises(WrongField, match=f"with {asked} does not take this scheduler.*scale_noise") as wrong:
        denoise(stage_of("flux"), encodings, request, posteriors=posteriors, pictures=pictures)
    assert wrong.value.param == "scheduler"

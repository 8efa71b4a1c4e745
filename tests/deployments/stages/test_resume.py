"""A request resumed from its journal draws the same image, and computes only the steps that are left."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.answers import DecodeArguments, JournalPart
from deployments.checkpoints.tiny.names import TINY_MODULES
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.options.resume import ResumeConfig, UnsavedPart
from deployments.options.step_cache import StepCacheConfig
from deployments.request import GenerationRequest, InputPictures
from deployments.stages import load_stage
from deployments.stages.denoise import Denoising
from deployments.stages.loop.fingerprint import Fingerprint
from deployments.stages.loop.journal_file import pack, read_journal, unpack, write_part
from deployments.stages.tensors import each_tensor
from tests.deployments.stages.test_staged_pipelines import calls_of, model, small_request
from tests.deployments.variants import build_request, encode, load_ranks, read_model, write_tiny
from tests.pictures import half_mask, picture, png, video
from tests.thorough import usually

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # from KDPM2's sigmas
QUICK = ("flux", "wan")
"""Checkpoints tested without --thorough: one with input images and a mask, one of videos."""
EVERY_STEP = {"every_steps": 1, "every_s": 0.0}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DPM++ multistep": ("DPMSolverMultistepScheduler", {}),
    "DPM++ multistep, SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ single step": ("DPMSolverSinglestepScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "PNDM by Runge-Kutta": ("PNDMScheduler", {"skip_prk_steps": False}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
USUAL = {"UniPC", "DPM++ multistep, SDE", "PNDM", "Heun", "KDPM2 ancestral"}
"""Schedulers tested without --thorough."""


@dataclass
class Run:
    """One denoise call: its result, and what was recorded of it."""

    arguments: DecodeArguments
    parts: list[JournalPart]
    steps: list[int]
    num_forwards: int


@dataclass
class Given:
    """Arguments of one denoise call."""

    request: GenerationRequest
    encodings: Any
    pictures: InputPictures | None = None
    posteriors: Any = ()
    extra: dict[str, Any] = field(default_factory=dict)


def run(stage: Denoising, given: Given, journal: tuple[JournalPart, ...] | list[JournalPart] = ()) -> Run:
    parts: list[JournalPart] = []
    steps: list[int] = []

    def save(part: UnsavedPart) -> None:
        parts.append(pickle.loads(pickle.dumps(part.read())))
        part.is_saved = True

    before, seat = num_forwards(stage), stage.join()
    try:
        arguments = stage.denoise(
            seat,
            given.encodings,
            given.request,
            lambda step, _: steps.append(step),
            posteriors=given.posteriors,
            pictures=given.pictures,
            journal=journal,
            on_part=save,
            **given.extra,
        )
    finally:
        stage.leave(seat)
    return Run(arguments, parts, steps, num_forwards(stage) - before)


def num_forwards(stage: Denoising) -> int:
    sizes = stage.engine.queue.stats().batch_sizes
    return sum(size * number for size, number in sizes.items())


@contextmanager
def loaded(of: ModelConfig, **settings: Any) -> Iterator[Denoising]:
    stage = load_ranks(of, **{"resume": EVERY_STEP} | settings)
    try:
        yield stage
    finally:
        stage.close()


def check_resumed(stage: Denoising, given: Given) -> Run:
    """Resumes the request after every step (three of them if there are many), each time in a new call, and checks
    the results.

    Returns the unbroken run.
    """
    unbroken = run(stage, given)
    assert unbroken.parts
    num_parts = len(unbroken.parts)
    for kept in range(1, num_parts + 1) if num_parts < 10 else (1, num_parts // 2, num_parts):
        journal = unbroken.parts[:kept]
        resumed = run(stage, given, journal)
        assert_equal(resumed.arguments, unbroken.arguments)
        answered = sum(len(part.forwards) for part in journal)
        assert resumed.num_forwards == unbroken.num_forwards - answered
        assert resumed.steps == unbroken.steps[journal[-1].num_steps :]
        assert len(resumed.parts) == len(unbroken.parts) - kept
    return unbroken


def assert_equal(one: DecodeArguments, other: DecodeArguments) -> None:
    pairs = list(zip(each_tensor(one.values), each_tensor(other.values), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b)


def pictures_for(of: ModelConfig, request: GenerationRequest) -> InputPictures | None:
    call = of.architecture.calls[request.kind]
    images = tuple(png(picture(seed, request.width)) for seed in range(min(2, call.max_images)))
    mask = png(half_mask(request.width)) if request.kind == "inpaint" else None
    control = png(picture(9, request.width)) if call.control else None
    film = video(request.num_frames + 3, (96, 80)) if call.takes_video else None
    return InputPictures(images, mask, control, film) if images or control or film else None


def given_for(of: ModelConfig, request: GenerationRequest) -> Given:
    pictures = pictures_for(of, request)
    encodings = encode(of, request, pictures)
    if pictures is None:
        return Given(request, encodings)
    posteriors = load_stage("decode", of, VaeConfig()).prepare(encodings, request, pictures)
    return Given(request, encodings, pictures, posteriors)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("tiny", list(TINY_MODULES) if is_thorough else QUICK)


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi computes its rotary embeddings in float32
def test_every_kind_of_call_goes_on_as_if_it_had_not_been_cut_off(tiny: str) -> None:
    of = model(tiny)
    with loaded(of) as stage:
        for kind in calls_of(tiny):
            if kind in of.architecture.calls:
                check_resumed(stage, given_for(of, small_request(tiny, kind)))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Denoising]:
    """A stage that offers all these schedulers."""
    named = [
        {"name": name, "class_name": class_name, "options": options}
        for name, (class_name, options) in STATEFUL.items()
    ]
    with loaded(
        read_model(write_tiny("sd15", tmp_path_factory.mktemp("sd15") / "checkpoint"), schedulers=named)
    ) as of:
        yield of


@pytest.mark.parametrize("scheduler", usually(STATEFUL, USUAL.__contains__))
def test_a_scheduler_has_the_state_that_it_had(sd15: Denoising, scheduler: str) -> None:
    check_resumed(sd15, blank("sd15", scheduler=scheduler, num_inference_steps=6))


def blank(tiny: str, **changes: Any) -> Given:
    """Returns a request with blank texts."""
    return Given(build_request(model(tiny), **changes), None, extra={"max_sequence_length": 32})


@pytest.fixture(scope="module")
def flux() -> Iterator[Denoising]:
    with loaded(model("flux")) as stage:
        yield stage


@pytest.fixture(scope="module")
def unbroken(flux: Denoising) -> Run:
    return run(flux, SIX_STEPS)


SIX_STEPS = blank("flux", num_inference_steps=6)


@pytest.mark.parametrize(
    "cache",
    [
        StepCacheConfig(interval=2, first_steps=2),
        StepCacheConfig(kind="easy_cache", threshold=0.5, first_steps=2),
    ],
    ids=lambda cache: cache.kind,
)
def test_a_step_cache_reuses_what_it_would_have_reused(flux: Denoising, cache: StepCacheConfig) -> None:
    told = check_resumed(flux, blank("flux", num_inference_steps=8, step_cache=cache))
    assert told.num_forwards < 8


def test_both_passes_of_guidance_under_way_at_once_go_on() -> None:
    """Both passes are under way at once because there are two shards."""
    with loaded(model("qwen-image"), shards=2) as stage:
        assert stage.pending_kinds
        guided = build_request(model("qwen-image"), true_cfg_scale=3.0)
        prompt = replace(guided.prompt, negative_text="blurry", is_guided=True)
        request = replace(guided, prompt=prompt)
        check_resumed(stage, Given(request, encode(model("qwen-image"), request)))


def test_the_denoisers_of_several_are_told_apart() -> None:
    """With Wan 2.2's experts: a request resumed after the first expert's steps runs only the second."""
    with loaded(model("wan22-a14b")) as stage:
        whole = check_resumed(stage, blank("wan22-a14b", num_inference_steps=4))
    assert {component for part in whole.parts for component, _ in part.forwards} >= {
        "transformer",
        "transformer_2",
    }


def test_files_keep_it_to_the_bit_and_as_it_lay(flux: Denoising, unbroken: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/0"
    for part in unbroken.parts:
        write_part(url, part)
    assert_equal(run(flux, SIX_STEPS, read_journal(url)).arguments, unbroken.arguments)
    odd = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).to(torch.bfloat16)
    told = unpack(pack(replace(unbroken.parts[0], forwards=(("unet", ([odd], None, {"a": odd[:1].clone()})),))))
    [(component, ([same], nothing, more))] = told.forwards
    assert (component, nothing, same.stride(), more["a"].shape) == ("unet", None, odd.stride(), (1, 3, 4, 5))
    assert torch.equal(same, odd)


def test_a_file_that_is_cut_off_ends_it_there(unbroken: Run, tmp_path: Path) -> None:
    url = str(tmp_path / "0")
    for part in unbroken.parts[:3]:
        write_part(url, part)
    last = sorted(tmp_path.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-8])
    assert [part.id for part in read_journal(url)] == [part.id for part in unbroken.parts[:2]]


def test_where_nothing_can_be_written_the_request_goes_on(unbroken: Run, tmp_path: Path) -> None:
    write_part(str(tmp_path / "is not there" / "0"), unbroken.parts[0])
    assert read_journal(str(tmp_path / "is not there" / "0")) == ()


@pytest.mark.parametrize("field", ["seed", "num_inference_steps"])
def test_of_another_request_it_is_of_no_use(flux: Denoising, unbroken: Run, field: str) -> None:
    asked = replace(SIX_STEPS.request, **{field: getattr(SIX_STEPS.request, field) + 1})
    other = replace(SIX_STEPS, request=asked)
    assert run(flux, other, unbroken.parts).num_forwards == asked.num_inference_steps


def test_of_other_weights_it_is_of_no_use(tmp_path: Path) -> None:
    one, same = write_tiny("flux", tmp_path / "one"), write_tiny("flux", tmp_path / "same")
    request = SIX_STEPS.request

    def told(folder: Path, *settings: Any) -> str:
        return Fingerprint(folder, ["transformer", "scheduler"], *settings).of(request, None)

    assert told(one) == told(same) != told(one, "float16")
    weights = next((same / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-len(data) // 4 :] = bytes(len(data) // 4)
    weights.write_bytes(data)
    assert told(one) != told(same)


def test_what_two_replicas_wrote_is_not_joined(flux: Denoising, unbroken: Run) -> None:
    """Each replica may have merged the request with others, so their results may differ in the last bits."""
    other = run(flux, SIX_STEPS)
    mixed = [*unbroken.parts[:2], *other.parts[2:]]
    assert run(flux, SIX_STEPS, mixed).num_forwards == 4
    assert run(flux, SIX_STEPS, unbroken.parts[1:]).num_forwards == 6


def test_who_was_resumed_is_resumed_again(flux: Denoising, unbroken: Run) -> None:
    second = run(flux, SIX_STEPS, unbroken.parts[:2])
    third = run(flux, SIX_STEPS, [*unbroken.parts[:2], *second.parts[:1]])
    assert third.num_forwards == 3
    assert_equal(third.arguments, unbroken.arguments)


def test_partial_pictures_that_were_told_are_not_told_again(flux: Denoising, unbroken: Run) -> None:
    """The partial images that follow are the same."""
    encodings = encode(model("flux"), SIX_STEPS.request)
    told: list[tuple[int, DecodeArguments]] = []
    extra = {"num_partial_images": 3, "on_partial": lambda *partial: told.append(partial)}
    given = Given(SIX_STEPS.request, encodings, extra=extra)
    whole, first = run(flux, given), list(told)
    assert [index for index, _ in first] == [0, 1, 2]
    told.clear()
    run(flux, given, whole.parts[:3])
    assert 0 < len(told) < 3
    for (index, arguments), (other_index, other) in zip(told, first[-len(told) :], strict=True):
        assert index == other_index
        assert_equal(arguments, other)


@pytest.mark.parametrize(
    ("resume", "num_steps"),
    [
        ({"every_steps": 2, "every_s": 0.0}, [2, 4]),
        ({"every_steps": 1, "every_s": 3600.0}, []),
        ({"every_steps": None, "every_s": 0.0}, []),
        ({"every_steps": 2, "every_s": 0.0, "max_mib": 0.01}, [2]),
    ],
)
def test_it_is_kept_as_the_config_says(flux: Denoising, resume: dict[str, Any], num_steps: list[int]) -> None:
    with said(flux, resume):
        assert [part.num_steps for part in run(flux, SIX_STEPS).parts] == num_steps


@contextmanager
def said(stage: Denoising, resume: dict[str, Any]) -> Iterator[None]:
    before = stage._config
    stage._config = before.model_copy(update={"resume": ResumeConfig(**resume)})
    try:
        yield
    finally:
        stage._config = before


def test_the_next_part_waits_until_the_last_is_saved(flux: Denoising) -> None:
    parts: list[UnsavedPart] = []
    seat = flux.join()
    try:
        flux.denoise(seat, None, SIX_STEPS.request, on_part=parts.append, **SIX_STEPS.extra)
    finally:
        flux.leave(seat)
    assert [part.read().num_steps for part in parts] == [1]

"""A checkpoint of two denoisers, Wan 2.2's experts: each a component of its own, on one rank or on several."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.answers import Encodings
from deployments.checkpoints.source import fetch_checkpoint
from deployments.engine.seat import Seat
from deployments.errors import CannotServe, WrongField
from deployments.request import GenerationRequest, Prompt
from deployments.stages.call_arguments import call_arguments
from deployments.stages.denoise import Denoising
from deployments.stages.trials.derive import Derived
from deployments.stages.warm_up import WarmUp
from tests.conftest import decoded_by
from tests.deployments.variants import (
    build_request,
    denoise,
    draw_plain,
    draw_staged,
    edit,
    encode,
    load_denoising,
    load_ranks,
    read_model,
    set_model,
    write_tiny,
)

SOON_S = 60.0
EXPERTS = ("transformer", "transformer_2")
MODEL = read_model(fetch_checkpoint("tiny://wan22-a14b", ()))
TOLERANCE = 2e-5 / 0.13
"""2e-5 for the scheduler's latents, which are divided by the VAE's factors before decoding."""


def request(seed: int = 3, num_inference_steps: int = 6, text: str = "a red cat") -> GenerationRequest:
    """Returns a request whose first two of six steps use the first expert, by the checkpoint's boundary_ratio."""
    plain = build_request(MODEL, guidance_scale=3.0)
    return replace(
        plain, seed=seed, num_inference_steps=num_inference_steps, prompt=Prompt(text, "blurry", is_guided=True)
    )


@cache
def encodings(text: str) -> Encodings:
    return encode(MODEL, request(text=text))


@cache
def plain_pipeline() -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(MODEL.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def plain_latents(of: GenerationRequest) -> torch.Tensor:
    pipe = plain_pipeline()
    with decoded_by(pipe) as decoded:
        pipe(**call_arguments(type(pipe), of, MODEL.architecture.max_sequence_length))
    return decoded[0]


Open = Callable[..., Denoising]


@pytest.fixture
def open_ranks() -> Iterator[Open]:
    """Yields a function that opens all ranks of a config in this process and returns rank 0, connected."""
    opened: list[Denoising] = []

    def open_all(**settings: Any) -> Denoising:
        opened.append(load_ranks(MODEL, **settings))
        return opened[-1]

    yield open_all
    for head in opened:
        head.close()


def draw(stage: Denoising, of: GenerationRequest) -> torch.Tensor:
    latents: torch.Tensor = denoise(stage, encodings(of.prompt.text), of).latents
    return latents


@pytest.mark.parametrize("name", ["wan22-a14b", "wan22-5b"])
def test_three_stages_draw_what_the_plain_pipeline_draws(name: str) -> None:
    """The 5B model has no second expert, but a timestep for each token."""
    model = read_model(fetch_checkpoint(f"tiny://{name}", ()))
    asked = replace(request(), height=96)
    frames = draw_staged(model, asked)
    expected = draw_plain(Path(model.checkpoint), asked, negative_prompt="blurry", guidance_scale=3.0)
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
    ("settings", "most_at_once", "tolerance"),
    [
        ({"cuts": (1,)}, 2, 0),
        ({"cuts": (1,), "parallel_guidance": False}, 1, 0),
        ({}, 1, 0),
        ({"parallel_guidance": True}, 2, TOLERANCE),
    ],
    ids=str,
)
def test_both_passes_of_a_lone_request_are_under_way_at_once_over_shards(
    open_ranks: Open, settings: dict[str, Any], most_at_once: int, tolerance: float
) -> None:
    """Over one shard both passes are under way at once only if the config says so, because they merge there."""
    stage = open_ranks(**settings)
    num_unread: list[int] = []
    begin = stage.engine.begin

    def noting(seat: Seat, before: int, component: str, inputs: Any, **options: Any) -> Any:
        num_unread.append(before)
        return begin(seat, before, component, inputs, **options)

    stage.engine.begin = noting  # type: ignore[method-assign]
    torch.testing.assert_close(draw(stage, request()), plain_latents(request()), atol=tolerance, rtol=0)
    assert num_unread == [*range(most_at_once)] * (12 // most_at_once)


def test_the_second_expert_may_have_a_scale_of_its_own() -> None:
    asked = replace(request(), guidance_scale_2=1.5)
    expected = draw_plain(
        plain_pipeline(), asked, negative_prompt="blurry", guidance_scale=3.0, guidance_scale_2=1.5
    )
    np.testing.assert_array_equal(draw_staged(MODEL, asked), expected)


def test_a_scale_for_an_expert_that_is_not_there_is_the_requests_mistake() -> None:
    model = read_model(fetch_checkpoint("tiny://wan", ()))
    with pytest.raises(WrongField, match="only supported when the pipeline's `boundary_ratio`") as refused:
        draw_staged(model, replace(build_request(model), guidance_scale_2=1.5))
    assert refused.value.param == "guidance_scale_2"


@pytest.mark.parametrize("name", ["wan22-a14b", "wan22-5b"])
def test_kinds_of_call_whose_pipeline_knows_one_expert_or_no_timestep_a_token_are_not_offered(name: str) -> None:
    """WanVideoToVideoPipeline would draw with the first expert only."""
    assert list(read_model(fetch_checkpoint(f"tiny://{name}", ())).architecture.calls) == ["generate"]
    assert "video_to_video" in read_model(fetch_checkpoint("tiny://wan", ())).architecture.calls


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_every_rank_has_its_blocks_of_each_expert(open_ranks: Open, cuts: tuple[int, ...]) -> None:
    assert torch.equal(draw(open_ranks(cuts=cuts), request()), plain_latents(request()))


@pytest.mark.parametrize("settings", [{}, {"cuts": (1,)}], ids=str)
def test_requests_at_either_expert_are_merged_with_those_at_the_same(
    open_ranks: Open, settings: dict[str, Any]
) -> None:
    """The requests differ in length, so that some use the first expert while others use the second."""
    stage = open_ranks(batch_wait_ms=100, **settings)
    texts = ("a red cat", "two blue whales under a paper moon")
    requests = [request(seed, num_steps, texts[seed % 2]) for seed, num_steps in enumerate([4, 9, 4, 9, 6, 6])]
    expected = [plain_latents(each) for each in requests]
    begin, flown = Barrier(len(requests)), note_flights(stage)

    def ask(each: GenerationRequest) -> torch.Tensor:
        begin.wait(SOON_S)
        return draw(stage, each)

    for each in requests:
        encodings(each.prompt.text)
    with ThreadPoolExecutor(len(requests)) as threads:
        for latents, wanted in zip(threads.map(ask, requests), expected, strict=True):
            torch.testing.assert_close(latents, wanted, atol=TOLERANCE, rtol=2e-5)
    sizes = {expert: [size for component, size in flown if component == expert] for expert in EXPERTS}
    assert all(max(sizes[expert]) > 1 for expert in EXPERTS), "nothing merged"
    assert sum(sizes["transformer"]) + sum(sizes["transformer_2"]) == 2 * sum(
        each.num_inference_steps for each in requests
    )


def note_flights(stage: Denoising) -> list[tuple[str, int]]:
    """Returns a list that collects (component, number of merged forwards) of each micro-batch."""
    driver, flown = stage.engine._driver, list[tuple[str, int]]()
    run = driver.run

    def noting(component: str, group: Any, *more: Any) -> Any:
        flown.append((component, len(group)))
        return run(component, group, *more)

    driver.run = noting  # type: ignore[method-assign]
    return flown


def test_stats_tell_of_each_expert_and_weights_of_both(open_ranks: Open) -> None:
    [rank] = open_ranks(cuts=(1,)).stats().ranks
    assert rank.blocks == {"transformer": (0, 1), "transformer_2": (0, 1)}
    [whole] = open_ranks().stats().ranks
    assert whole.blocks == {"transformer": (0, 3), "transformer_2": (0, 3)}
    held = sum(p.nbytes for name in EXPERTS for p in getattr(plain_pipeline(), name).parameters())
    assert whole.memory.weights_bytes == {"cpu float32": held}


def test_a_partial_picture_is_of_latents_at_either_expert(open_ranks: Open) -> None:
    stage, found = open_ranks(), dict[int, torch.Tensor]()
    seat = stage.join()
    stage.denoise(
        seat,
        encodings("a red cat"),
        request(),
        num_partial_images=2,
        on_partial=lambda index, arguments: found.update({index: arguments.latents}),
    )
    stage.leave(seat)
    assert {index: partial.shape for index, partial in found.items()} == dict.fromkeys(
        (0, 1), plain_latents(request()).shape
    )


def test_a_derived_family_serves_them_as_well() -> None:
    told = Derived(Path(MODEL.checkpoint)).describe()
    assert told["geometry"]["size_multiple"] == MODEL.geometry.size_multiple


def test_an_expert_of_another_model_is_told_by_name_at_start(tmp_path: Path) -> None:
    folder = write_tiny("wan22-a14b", tmp_path / "x")
    set_model(folder, "transformer_2", "WanTransformer3DModel", text_dim=32)
    with pytest.raises(CannotServe, match="its transformer_2 does not take what its text encoders"):
        load_denoising(read_model(folder))


def test_an_expert_without_weights_is_told_by_name_at_start(tmp_path: Path) -> None:
    folder = write_tiny("wan22-a14b", tmp_path / "x")
    (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="transformer_2 has no weights"):
        load_denoising(read_model(folder))


def test_a_warm_up_asks_every_expert(open_ranks: Open) -> None:
    """A request of one step alone would not run the second expert."""
    stage = open_ranks()
    flown = note_flights(stage)
    stage.warm_up(WarmUp((request(num_inference_steps=1),), 16))
    assert {component for component, _ in flown} == set(EXPERTS)


def test_an_expert_that_nothing_asks_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny("wan22-a14b", tmp_path / "x")
    edit(folder / "model_index.json", boundary_ratio=None)
    with caplog.at_level("WARNING"):
        load_denoising(read_model(folder)).close()
    assert "does not call its transformer_2 in a request with the defaults" in caplog.text


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # parameters
def test_a_device_map_gives_each_expert_its_part_of_the_memory(open_ranks: Open) -> None:
    held = sum(p.nbytes for name in EXPERTS for p in getattr(plain_pipeline(), name).parameters())
    stage = open_ranks(device_map="auto", max_memory={"cpu": f"{held * 3 // 4 // 1000}KB"})
    [rank] = stage.stats().ranks
    places = {
        name: {rank.device_map[key] for key in rank.device_map if key.startswith(f"{name}.")} for name in EXPERTS
    }
    assert all(there == {"cpu", "disk"} for there in places.values())
    assert torch.equal(draw(stage, request()), plain_latents(request()))


@pytest.mark.parametrize("settings", [{}, {"cuts": (1,)}], ids=str)
def test_experts_that_come_by_turns_stay_for_more_than_a_forward(
    open_ranks: Open, settings: dict[str, Any]
) -> None:
    """Two requests use both experts; without this, the experts would change at nearly each of the 26 forwards."""
    stage = open_ranks(offload="model", max_batch_size=1, **settings)
    requests = [request(1, 4), request(2, 9)]
    flown = note_flights(stage)
    with ThreadPoolExecutor(2) as threads:
        for latents, each in zip(threads.map(lambda each: draw(stage, each), requests), requests, strict=True):
            assert torch.equal(latents, plain_latents(each))
    components = [component for component, _ in flown]
    assert len(components) == 2 * (4 + 9)
    assert sum(one != other for one, other in pairwise(components)) <= 3

"""One stage's part of a pipeline's call, on tiny checkpoints."""

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from deployments.answers import Encodings
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.families import FAMILIES
from deployments.stages import load_stage
from deployments.stages.call_arguments import call_arguments
from tests.deployments.variants import build_request, denoise, load_denoising, read_model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return read_model(f"tiny://{request.param}", family=request.param)


@pytest.fixture(scope="module")
def stage(model: ModelConfig) -> Iterator[Any]:
    stage = load_denoising(model)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def encodings(model: ModelConfig) -> Encodings:
    made: Encodings = load_stage("encode", model, EncoderConfig()).encode(build_request(model))
    return made


def test_what_would_be_decoded_after_the_last_step_is_what_is(
    model: ModelConfig, stage: Any, encodings: Encodings
) -> None:
    """A partial image is what the end of the call makes of an earlier step's latents."""
    steps: list[torch.Tensor] = []
    request, seat = build_request(model), stage.join()
    arguments = stage.denoise(seat, encodings, request, lambda _step, latents: steps.append(latents))
    stage.leave(seat)
    finished = stage._calls.of(request).finish(request, stage._stand_ins(stage._zeros), encodings, steps[-1])
    assert torch.equal(finished.latents, arguments.latents)


def test_a_request_leaves_nothing_in_the_pipeline_that_all_share(
    model: ModelConfig, stage: Any, encodings: Encodings
) -> None:
    request = build_request(model)
    pipe = stage._calls.of(request)._pipe
    before, settings = dict(vars(pipe)), dict(pipe.config)
    denoise(stage, encodings, request)
    assert vars(pipe) == before
    assert dict(pipe.config) == settings


def test_encodings_of_another_call_are_not_taken_for_this_ones(
    model: ModelConfig, stage: Any, encodings: Encodings
) -> None:
    others = tuple((f"not {name}", value) for name, value in encodings)
    with pytest.raises(RuntimeError, match=r"calls encode_prompt where .* called not encode_prompt"):
        denoise(stage, others, build_request(model))


def test_a_pipeline_is_called_with_what_it_knows(model: ModelConfig) -> None:
    pipeline_class = getattr(diffusers, model.architecture.pipeline_class)
    arguments = call_arguments(pipeline_class, build_request(model), 32)
    assert arguments.keys() <= inspect.signature(pipeline_class.__call__).parameters.keys()
    assert arguments["height"] == arguments["width"] == 64
    assert ("max_sequence_length" in arguments) == (model.architecture.max_sequence_length is not None)
    assert ("num_frames" in arguments) == (model.architecture.media == "video")

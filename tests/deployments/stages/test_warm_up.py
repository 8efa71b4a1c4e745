"""After a replica's warm-up, the first requests of users compile nothing."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from deployments.answers import Conditioning, DecodeArguments
from deployments.checkpoints.geometry import with_geometry
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.families import FAMILIES
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from deployments.stages.warm_up import WarmUp
from deployments.transformer import Transformer
from serve_app.config.app import ConfigError
from serve_app.config.check import plan_warm_up
from serve_app.config.limits import LimitsConfig
from serve_app.validation import Validator
from tests.thorough import usually

COMPILE = {"compile": {"backend": "eager"}}
TOKENS = 32


def build_model(family: str, size: str | None = None) -> ModelConfig:
    if size is None:
        size = "64x48x5" if FAMILIES[family].media == "video" else "64x48"
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family, warm_up=(size,))
    return with_geometry(model)


def build_warm_up(family: str) -> WarmUp:
    return WarmUp(plan_warm_up(build_model(family), LimitsConfig()), TOKENS)


def build_request(family: str) -> GenerationRequest:
    """Returns a user's request, of the size that is warm."""
    frames = {"num_frames": 5} if FAMILIES[family].media == "video" else {}
    fields = {"prompt": "a red fox in the snow", "size": "64x48", "num_inference_steps": 3, "seed": 5} | frames
    [request] = Validator(build_model(family), LimitsConfig()).requests(fields)
    return request


def build_stage(stage: str, family: str, config: Any) -> Any:
    return load_stage(stage, build_model(family), config)


def encoder_config(family: str, **settings: Any) -> EncoderConfig:
    tokens = None if FAMILIES[family].max_sequence_length is None else TOKENS
    return EncoderConfig(max_sequence_length=tokens, **settings)


@pytest.fixture
def graphs() -> Iterator[Any]:
    """Yields a function that returns the number of graphs compiled so far."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", usually(FAMILIES, lambda family: family in ("flux", "wan")))
def test_the_first_picture_of_a_listed_size_compiles_nothing(family: str, graphs: Any) -> None:
    """The image is the one that a replica draws without warm-up and compilation."""
    request = build_request(family)
    embeds = build_stage("encode", family, encoder_config(family)).encode(request)

    def draw(warm_up: WarmUp, **settings: Any) -> torch.Tensor:
        stage = build_stage("denoise", family, TransformerConfig(**settings))
        stage.connect(None, pytest.fail)
        stage.warm_up(warm_up)
        before.append(graphs())
        latents: torch.Tensor = stage.denoise(stage.join(), embeds, request, on_step=lambda *_: None).latents
        stage.close()
        return latents

    before: list[int] = []
    latents = draw(build_warm_up(family), **COMPILE)
    assert graphs() == before[0] > 0
    assert torch.equal(latents, draw(WarmUp()))


@pytest.mark.parametrize("family", usually(FAMILIES, lambda family: family in ("flux", "sd15", "wan")))
def test_blank_texts_and_latents_are_shaped_as_real_ones(family: str) -> None:
    request = build_request(family)
    encodings = build_stage("encode", family, encoder_config(family)).encode(request)
    stage = build_stage("denoise", family, TransformerConfig())
    stage.connect(None, pytest.fail)
    seen: list[list[torch.Size]] = []
    begin = stage.engine.begin

    def noting(seat: Any, place: int, component: str, inputs: Any, **options: Any) -> Any:
        seen.append([tensor.shape for tensor in each_tensor(dict(inputs))])
        return begin(seat, place, component, inputs, **options)

    stage.engine.begin = noting
    length = encoder_config(family).max_sequence_length
    real = stage.denoise(stage.join(), encodings, request).latents
    blank = stage.denoise(stage.join(), None, request, max_sequence_length=length).latents
    stage.close()
    assert blank.shape == real.shape
    half = len(seen) // 2
    assert half
    if family != "qwen-image":  # its texts are not padded
        assert seen[:half] == seen[half:]
    vae = build_stage("decode", family, VaeConfig())
    assert vae._blank(request.size).latents.shape == real.shape


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_encoder_and_vae_compile_nothing_afterwards(stage: str, graphs: Any) -> None:
    request = replace(build_request("sd15"), num_inference_steps=1)
    settings = {"compile": {"backend": "eager", "scope": "model"}}
    config = encoder_config("sd15", **settings) if stage == "encode" else VaeConfig(**settings)
    warm = build_stage(stage, "sd15", config)
    warm.warm_up(build_warm_up("sd15"))
    before = graphs()
    if stage == "encode":
        warm.encode(request)
    else:
        frames = warm.decode(DecodeArguments.of(torch.zeros(1, 4, 48 // 8, 64 // 8)), request)
        assert isinstance(frames, np.ndarray)
    assert graphs() == before > 0


def test_a_replica_is_warm_once_it_is_built(graphs: Any) -> None:
    family = "flux"
    request = build_request(family)
    embeds = build_stage("encode", family, encoder_config(family)).encode(request)
    transformer = Transformer(build_model(family), TransformerConfig(**COMPILE), build_warm_up(family))
    before = graphs()

    async def draw() -> list[Any]:
        return [item async for item in transformer.denoise(Conditioning(embeds, 1.0), request)]

    assert len(asyncio.run(draw())) == 2
    assert graphs() == before > 0
    assert asyncio.run(transformer.stats()).queue.num_seats == 0


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("flux", "65x64", "multiples of 16"),
        ("flux", "64x64x5", "num_frames"),
        ("flux", "4096x4096", "the limit is"),
        ("wan", "64x64x6", "1 more than a multiple of 4"),
    ],
)
def test_a_size_that_nobody_may_ask_for_is_refused(family: str, size: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.warm_up, {size}: .*{message}"):
        plan_warm_up(build_model(family, size), LimitsConfig())


def test_what_is_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, got '64'"):
        build_model("flux", "64")

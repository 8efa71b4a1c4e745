"""The denoise deployment, constructed without a cluster."""

import asyncio
from typing import Any

import pytest
import torch

from deployments.config import EncoderConfig, ModelConfig, TransformerConfig
from deployments.request import Conditioning, Denoised, GenerationRequest, Progress, Prompt
from deployments.stages import load_stage
from deployments.transformer import Transformer

MODEL = ModelConfig(name="tiny", checkpoint="tiny://sd15")


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return Transformer(MODEL, "sd15", TransformerConfig())


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    encoding = load_stage("encode", MODEL, "sd15", EncoderConfig())
    return Conditioning(encoding.encode(Prompt("a cat", None, True)), 1.0, False)


def request(steps: int, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(Prompt("a cat", None, True), 64, 64, 1, steps, 7.5, None, seed, "png", 100, 16)


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


def test_progress_comes_first_and_the_latents_last_and_alone(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    *progress, denoised, latents = asyncio.run(collect(transformer.denoise(conditioning, request(6), True)))
    assert progress
    assert all(isinstance(item, Progress) and item.num_steps == 6 for item in progress)
    assert isinstance(denoised, Denoised)
    assert latents.shape == (1, 4, 8, 8)


def test_nobody_is_told_of_progress_unasked(transformer: Transformer, conditioning: Conditioning) -> None:
    items = asyncio.run(collect(transformer.denoise(conditioning, request(6))))
    assert [type(item) for item in items] == [Denoised, torch.Tensor]


def test_requests_of_different_lengths_get_what_each_gets_alone(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    async def together() -> list[Any]:
        streams = [transformer.denoise(conditioning, request(3 + i, seed=i)) for i in range(4)]
        return await asyncio.gather(*(collect(stream) for stream in streams))

    merged = [items[-1] for items in asyncio.run(together())]
    for i, latents in enumerate(merged):
        alone = asyncio.run(collect(transformer.denoise(conditioning, request(3 + i, seed=i))))[-1]
        torch.testing.assert_close(latents, alone, atol=2e-5, rtol=2e-5)


def test_a_listener_that_leaves_frees_its_seat(transformer: Transformer, conditioning: Conditioning) -> None:
    async def scenario() -> None:
        stream = transformer.denoise(conditioning, request(500), True)
        await anext(stream)
        assert (await transformer.stats()).queue.num_seats == 1
        await stream.aclose()
        assert (await transformer.stats()).queue.num_seats == 0

    asyncio.run(scenario())


def test_what_a_forward_raises_reaches_its_request_and_only_that(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    wrong = Conditioning({name: torch.zeros(1, 7, 5) for name in conditioning.embeds}, 0.0, False)

    async def scenario() -> list[Any]:
        streams = [transformer.denoise(given, request(3)) for given in (wrong, conditioning)]
        return await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)

    failed, served = asyncio.run(scenario())
    assert isinstance(failed, RuntimeError)
    assert isinstance(served[-1], torch.Tensor)


def test_stats_tell_blocks_bytes_and_work(transformer: Transformer, conditioning: Conditioning) -> None:
    asyncio.run(collect(transformer.denoise(conditioning, request(3))))
    stats = asyncio.run(transformer.stats())
    [rank] = stats.ranks
    assert rank.blocks[0] == 0
    assert list(rank.weights_bytes) == ["cpu float32"]
    assert rank.num_micro_batches == sum(stats.queue.batch_sizes.values()) > 0
    assert 0 <= stats.bubble(0) < 1

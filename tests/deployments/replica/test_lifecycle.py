"""A replica whose GPU is lost ends, because no answer of it would be right."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from deployments.answers import Conditioning, DecodeArguments
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.encoder import Encoder
from deployments.replica.lifecycle import StageReplica
from deployments.replica.rank import Rank
from deployments.transformer import Transformer
from deployments.vae import Vae
from tests.deployments.memory.tiny_request import build_request
from tests.pretend_cuda import install

pytestmark = pytest.mark.pretended_gpu
MODEL = ModelConfig(name="tiny", checkpoint="tiny://sd15", family="sd15")
REQUEST = build_request("sd15")
Build = Callable[[], StageReplica]
Work = Callable[[Any], Coroutine[Any, Any, Any]]
LATENTS = torch.zeros(1, 4, 8, 8)


class Ended(BaseException):
    """Raised in place of the process's end."""


@pytest.fixture
def lost_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Returns a context in which this process's GPU is lost; the process must try to end, which raises Ended."""

    def end(status: int) -> None:
        raise Ended(status)

    @contextmanager
    def lost() -> Iterator[None]:
        monkeypatch.setattr(os, "_exit", end)
        install.native.lose(True)
        try:
            with pytest.raises(Ended):
                yield
        finally:
            install.native.lose(False)

    return lost


def encode(encoder: Encoder) -> Coroutine[Any, Any, Any]:
    return encoder.encode(REQUEST)


def decode(vae: Vae) -> Coroutine[Any, Any, Any]:
    return vae.decode(DecodeArguments.of(LATENTS), REQUEST)


async def denoise(transformer: Transformer) -> list[Any]:
    encodings = (("encode_prompt", (torch.zeros(1, 77, 64), torch.zeros(1, 77, 64))),)
    return [item async for item in transformer.denoise(Conditioning(encodings, 0.0), REQUEST)]


STAGES = [
    pytest.param(lambda: Encoder(MODEL, EncoderConfig(num_gpus=1)), encode, id="encoder"),
    pytest.param(lambda: Transformer(MODEL, TransformerConfig(num_gpus=1)), denoise, id="transformer"),
    pytest.param(lambda: Vae(MODEL, VaeConfig(num_gpus=1)), decode, id="vae"),
]


@pytest.mark.parametrize(("build", "work"), STAGES)
def test_a_request_that_finds_the_gpu_lost_ends_the_process(
    build: Build, work: Work, lost_gpu: Callable[[], AbstractContextManager[None]]
) -> None:
    replica = build()
    with lost_gpu():
        asyncio.run(work(replica))


@pytest.mark.parametrize(("build", "work"), STAGES)
def test_a_gpu_that_is_lost_between_two_requests_ends_the_process(
    build: Build, work: Work, lost_gpu: Callable[[], AbstractContextManager[None]]
) -> None:
    replica = build()
    asyncio.run(replica.check_health())
    with lost_gpu():
        asyncio.run(replica.check_health())


def test_a_gpu_that_another_rank_loses_between_two_requests_ends_its_process(
    lost_gpu: Callable[[], AbstractContextManager[None]],
) -> None:
    rank = Rank(1, MODEL, TransformerConfig(num_gpus=1, shards=2))
    with lost_gpu():
        asyncio.run(rank.alive())


def test_another_error_ends_nothing() -> None:
    vae = Vae(MODEL, VaeConfig(num_gpus=1))
    with pytest.raises(RuntimeError, match="channels"):
        asyncio.run(vae.decode(DecodeArguments.of(torch.zeros(1, 3, 8, 8)), REQUEST))
    asyncio.run(decode(vae))

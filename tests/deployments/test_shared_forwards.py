"""Replicas whose ranks share forwards, beside block shards: what they draw, hold, and do when a rank fails."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.config import EncoderConfig, TransformerConfig, VaeConfig
from deployments.plan.describe import Description
from deployments.request import GenerationRequest, MediaSize
from tests.deployments.rank_processes import RankProcesses, broken_at, denoise
from tests.deployments.test_same_picture import build_request, build_settings
from tests.thorough import usually
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.slow
WAYS = [
    ("flux", {"context_parallel": 2}),
    ("flux", {"tensor_parallel": 2, "shards": 2}),
    ("qwen-image", {"context_parallel": 2, "shards": 2}),
    ("wan", {"context_parallel": 2, "shards": 2}),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(4)
    yield ranks
    ranks.end()


@pytest.mark.parametrize(
    ("family", "settings"), usually(WAYS, lambda way: way[0] == "qwen-image" and "shards" in way[1]), ids=str
)
def test_they_draw_what_the_plain_pipeline_draws(
    ranks: RankProcesses, plain: Callable[..., Any], family: str, settings: dict[str, Any]
) -> None:
    """One alone, then several at once, which merge; and each rank holds what was planned."""
    config = TransformerConfig(**settings, max_batch_size=4, batch_wait_ms=50)
    ranks.open(tiny_model(family), config)
    requests = [build_request(family, guided=True, seed=seed) for seed in range(3)]
    requests.append(replace(requests[0], width=96, seed=7))
    check(plain, family, requests[:1], ranks.denoise(requests[0]))
    check(plain, family, requests, ranks.denoise(*requests))
    assert any(size > 1 for size in ranks.batch_sizes()), "nothing merged"
    sizes = Description(tiny_model(family)).sizes(EncoderConfig(), config, VaeConfig(), (MediaSize(64, 64),))
    held = [sum(rank.memory.weights_bytes.values()) for rank in ranks.stats()]
    assert [rank.weights_bytes for rank in sizes.denoise.ranks] == pytest.approx(held, rel=0.03)


def check(plain: Callable[..., Any], family: str, requests: list[GenerationRequest], latents: list[Any]) -> None:
    for request, got in zip(requests, latents, strict=True):
        if isinstance(got, Exception):
            raise got
        expected = plain(
            family, "a red cat", seed=request.seed, output_type="latent", **build_settings(family, request)
        )
        # 2e-5 of the scheduler's latents; before decoding they are divided by the VAE's factor, 0.13 at least.
        torch.testing.assert_close(got, expected, atol=1.5e-4, rtol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"context_parallel": 2, "compile": {"backend": "eager"}},
        {"context_parallel": 2, "offload": "model", "shards": 2},
        {"context_parallel": 2, "offload": {"kind": "group", "level": "block"}, "shards": 2},
        {"context_parallel": 2, "vram_limit_gib": 2**-9, "shards": 2},
        {"tensor_parallel": 2, "compile": {"backend": "eager"}},
    ],
    ids=str,
)
def test_techniques_that_leave_the_picture_as_it_is_go_with_it(
    ranks: RankProcesses, plain: Callable[..., Any], settings: dict[str, Any]
) -> None:
    ranks.open(tiny_model("flux"), TransformerConfig(**settings))
    request = build_request("flux", guided=True)
    check(plain, "flux", [request], ranks.denoise(request))


def test_a_rank_that_has_no_room_after_its_last_collective_fails_that_forward_alone(ranks: RankProcesses) -> None:
    ranks.open(tiny_model("flux"), TransformerConfig(context_parallel=2, shards=2))
    request = build_request("flux", guided=False)
    [before] = ranks.denoise(request)
    ranks.ask(3, broken_at("transformer", "after")).result()
    [failed] = ranks.denoise(request)
    assert "no room after" in str(failed)
    [after] = ranks.denoise(request)
    assert torch.equal(before, after)


def test_what_no_rank_can_compute_fails_alone(ranks: RankProcesses) -> None:
    ranks.open(tiny_model("flux"), TransformerConfig(context_parallel=2, shards=2))
    request = build_request("flux", guided=False)
    for rank in range(2):
        ranks.ask(rank, broken_at("transformer", "before")).result()
    [failed] = ranks.denoise(request)
    assert "no room before" in str(failed)
    [after] = ranks.denoise(request)
    assert isinstance(after, torch.Tensor)


@pytest.mark.thorough
@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_the_loss_of_any_rank_ends_rank_0(lost: int) -> None:
    """It is its replica: Serve starts another."""
    ranks = RankProcesses(4)
    ranks.open(tiny_model("flux"), TransformerConfig(context_parallel=2, shards=2))
    answer = ranks.ask(0, denoise, [replace(build_request("flux", guided=False), num_inference_steps=10_000)])
    time.sleep(1)
    ranks.kill(lost)
    with pytest.raises(BrokenProcessPool):
        answer.result(timeout=60)
    ranks.end()

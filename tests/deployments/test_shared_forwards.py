"""Replicas whose ranks share forwards, with and without block shards: images, memory, and failures of a rank."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.options.adapter import Adapter, AdapterConfig, ScaledAdapter
from deployments.plan.describe import Description
from deployments.request import GenerationRequest, MediaSize
from deployments.stages.call_arguments import call_arguments
from tests.conftest import decoded_by
from tests.deployments.lora import load_with, write_lora
from tests.deployments.rank_processes import RankProcesses, broken_at, denoise
from tests.deployments.test_same_picture import build_request, build_settings
from tests.deployments.variants import build_request as asked
from tests.deployments.variants import read_model
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


ADAPTED = [
    (family, {"context_parallel": 2} | more)
    for family in ("flux", "qwen-image", "wan")
    for more in ({}, {"shards": 2})
]


@pytest.mark.parametrize(("family", "settings"), usually(ADAPTED, ADAPTED[0].__eq__), ids=str)
def test_adapters_of_any_layer_draw_what_they_draw_with_peft(
    ranks: RankProcesses, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """Runs before the other tests: a process that has served a model without adapters continues without peft.

    The output of the last layer is gathered from all ranks; other layers see their rank's part of the sequence.
    """
    checkpoint = fetch_checkpoint(f"tiny://{family}", ())
    source = write_lora(tmp_path, checkpoint, seed=1, layers=r".*(to_q|net\.2|(?<!\w)proj_out)")
    model = read_model(checkpoint, adapters={"a": AdapterConfig(source=str(source))})
    adapter = Adapter("a", str(source))
    ranks.open(model, TransformerConfig(**settings, max_batch_size=4, batch_wait_ms=50))
    ranks.load_adapter(adapter)
    scales = (1.0, -0.5, None)
    requests = [
        replace(
            asked(model, num_inference_steps=4),
            seed=seed,
            adapters=() if scale is None else (ScaledAdapter(adapter, scale),),
        )
        for seed, scale in enumerate(scales)
    ]
    drawn = ranks.denoise(*requests)
    pipe = load_with(checkpoint, {"a": source})
    for request, scale, latents in zip(requests, scales, drawn, strict=True):
        if isinstance(latents, Exception):
            raise latents
        pipe.set_adapters(["a"], [scale or 0.0])
        with decoded_by(pipe) as decoded:
            pipe(**call_arguments(type(pipe), request, 64))
        np.testing.assert_allclose(latents, decoded[0], atol=2e-5 * float(decoded[0].abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("family", "settings"), usually(WAYS, lambda way: way[0] == "qwen-image" and "shards" in way[1]), ids=str
)
def test_they_draw_what_the_plain_pipeline_draws(
    ranks: RankProcesses, plain: Callable[..., Any], family: str, settings: dict[str, Any]
) -> None:
    """Draws one request alone, then several at once, which merge; each rank holds the planned weights."""
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
        # 2e-5 for the scheduler's latents, which are divided by the VAE's factor (0.13 or more) before decoding.
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
    """Rank 0's process is the replica: when it ends, Serve starts another."""
    ranks = RankProcesses(4)
    ranks.open(tiny_model("flux"), TransformerConfig(context_parallel=2, shards=2))
    answer = ranks.ask(0, denoise, [replace(build_request("flux", guided=False), num_inference_steps=10_000)])
    time.sleep(1)
    ranks.kill(lost)
    with pytest.raises(BrokenProcessPool):
        answer.result(timeout=60)
    ranks.end()

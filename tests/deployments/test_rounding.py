"""Lossless options are as accurate as float32: shards, guidance passes at once, merging, inference mode.

The latents of several requests, drawn in each of WAYS, are compared with those of plain diffusers in float64.
Their errors must be close to those of plain diffusers in float32. `pytest -s --thorough
tests/deployments/test_rounding.py` prints the table of docs/engine.md.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from cluster.ranks.place import Place
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.families import FAMILIES
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage
from deployments.stages.call_arguments import call_arguments
from deployments.stages.denoise import Denoising
from tests.deployments.float64 import in_float64, load_float64
from tests.deployments.plain import latents_of
from tests.deployments.recorded import load_tiny
from tests.deployments.variants import build_request, denoise
from tests.thorough import usually
from tests.tiny_models import tiny_model

LIMIT = 1.5
"""Largest allowed error, as a multiple of float32's."""
MOST_BIAS = 8.0
"""Largest allowed bias: of 10,000 sets of eight unbiased images one exceeds it (Student's t, 7 degrees of
freedom)."""
PROMPTS = ("a red cat", "two blue whales under a paper moon", "fog", "an old woodcut of a harbour with nine ships")
NUM_TOKENS = 32
"""Number of text tokens, for pipelines that take it as an argument."""
WAYS: Sequence[tuple[TransformerConfig, Mapping[str, bool]]] = (
    (TransformerConfig(shards=2, batch_wait_ms=500), {"two shards": False, "merged, two shards": True}),
    (TransformerConfig(parallel_guidance=True, batch_wait_ms=500), {"merged": True}),
)
"""Configs of the denoise stage, with the ways of each: whether all requests run at once, by the way's name.

Where guidance has two passes, they always run at once; those of one request merge over one shard only.
"""


@dataclass(frozen=True)
class Errors:
    """Errors of latents [images, values], against float64."""

    of: torch.Tensor

    @property
    def rms(self) -> float:
        return float(self.of.square().mean().sqrt())

    @property
    def max(self) -> float:
        """Largest error of each image, averaged over the images."""
        return float(self.of.abs().amax(dim=1).mean())

    @property
    def bias(self) -> float:
        """The mean error divided by its standard error, which comes from the means of the images: these are
        independent."""
        means = self.of.mean(dim=1)
        return float(means.mean() / means.std() * len(means) ** 0.5)


@dataclass(frozen=True)
class Drawn:
    """The images of one family."""

    plain: Errors
    ways: Mapping[str, Errors]
    batch_sizes: Mapping[str, Mapping[int, int]]
    """For each way, the number of micro-batches by the number of forwards in them."""


@cache
def draw(family: str, num_pictures: int, num_steps: int, width: int) -> Drawn:
    model = tiny_model(family)
    requests = [build(family, number, num_steps, width) for number in range(num_pictures)]
    tokens = NUM_TOKENS if FAMILIES[family].max_sequence_length else None
    wide = load_float64(fetch_checkpoint(model.checkpoint, ()))
    with in_float64():
        exact = draw_plain(wide, requests, tokens)
    encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=tokens))
    encodings = [encoding.encode(request) for request in requests]
    ways, batch_sizes = {}, {}
    for config, are_together in WAYS:
        with connected(family, config) as stage:
            for way, num_threads in {
                way: num_pictures if many else 1 for way, many in are_together.items()
            }.items():
                before = Counter(stage.stats().queue.batch_sizes)
                with ThreadPoolExecutor(num_threads) as threads:
                    drawn = list(threads.map(partial(denoise, stage), encodings, requests))
                ways[way] = Errors(rows(arguments.latents for arguments in drawn) - exact)
                batch_sizes[way] = Counter(stage.stats().queue.batch_sizes) - before
    return Drawn(Errors(draw_plain(load_tiny(family), requests, tokens) - exact), ways, batch_sizes)


def build(family: str, number: int, num_steps: int, width: int) -> GenerationRequest:
    """Returns a request whose guidance needs two predictions."""
    of = FAMILIES[family].call
    prompt = Prompt(f"{PROMPTS[number % len(PROMPTS)]}, no. {number}", "blurry", is_guided=True)
    scales = {"guidance_scale": of.defaults.guidance_scale, of.guidance: 3.0}
    return replace(
        build_request(tiny_model(family)),
        prompt=prompt,
        width=width,
        seed=number,
        num_inference_steps=num_steps,
        **scales,
    )


def draw_plain(pipe: Any, requests: Sequence[GenerationRequest], tokens: int | None) -> torch.Tensor:
    return rows(latents_of(pipe, **call_arguments(pipe, request, tokens)) for request in requests)


def rows(latents: Any) -> torch.Tensor:
    return torch.stack([each.flatten().double() for each in latents])


@contextmanager
def connected(family: str, config: TransformerConfig) -> Iterator[Denoising]:
    """Yields the denoise stage with all its ranks in this process."""
    model, num_ranks = tiny_model(family), config.num_ranks
    stage = load_stage("denoise", model, config)
    workers = [load_stage("worker", model, config, rank) for rank in range(1, num_ranks)]
    rendezvous = stage.open_rendezvous("127.0.0.1", [Place("node", None)] * num_ranks) if workers else None
    with ThreadPoolExecutor(num_ranks) as threads:
        for rank in (stage, *workers):
            threads.submit(rank.connect, rendezvous, pytest.fail)
    yield stage
    stage.close()
    for worker in workers:
        worker._ring.close()


QUICK = (8, 3, 64)
USUAL = {"flux", "sd15"}
"""Families tested without --thorough: a transformer and a UNet."""
CASES = pytest.mark.parametrize(
    ("family", "num_pictures", "num_steps", "width"),
    usually(
        [(family, *case) for case in (QUICK, (8, 20, 96)) for family in FAMILIES],
        lambda of: of[1:] == QUICK and of[0] in USUAL,
    ),
)


@CASES
def test_errors_are_no_larger_than_float32s(family: str, num_pictures: int, num_steps: int, width: int) -> None:
    drawn = draw(family, num_pictures, num_steps, width)
    print(row(family, num_steps, drawn))
    for way, errors in drawn.ways.items():
        assert errors.rms <= LIMIT * drawn.plain.rms, way
        assert errors.max <= LIMIT * drawn.plain.max, way


@CASES
def test_errors_have_no_bias(family: str, num_pictures: int, num_steps: int, width: int) -> None:
    for way, errors in draw(family, num_pictures, num_steps, width).ways.items():
        assert abs(errors.bias) <= MOST_BIAS, way


@pytest.mark.parametrize("family", usually(FAMILIES, USUAL.__contains__))
def test_they_were_merged(family: str) -> None:
    """Otherwise the other tests would say nothing about merging."""
    for way, sizes in draw(family, *QUICK).batch_sizes.items():
        assert (max(sizes) > 1) == way.startswith("merged"), way


@pytest.mark.parametrize(
    "wrong",
    [
        lambda errors: 1.6 * errors,
        lambda errors: errors + 0.5 * errors.std(),
        lambda errors: errors - errors.std(),
    ],
)
def test_a_larger_error_or_one_with_a_bias_would_be_seen(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    plain = draw("flux", *QUICK).plain
    spoilt = Errors(wrong(plain.of))
    assert spoilt.rms > LIMIT * plain.rms or abs(spoilt.bias) > MOST_BIAS


def row(family: str, num_steps: int, drawn: Drawn) -> str:
    """Returns a row of the table: float32's errors, the ratios to them, and the bias."""
    ways = (
        f"{of.rms / drawn.plain.rms:.2f}, {of.max / drawn.plain.max:.2f}, {of.bias:+.1f}"
        for of in drawn.ways.values()
    )
    plain = f"{drawn.plain.rms:.1e}, {drawn.plain.max:.1e}, {drawn.plain.bias:+.1f}"
    return f"| {' | '.join((family, str(num_steps), plain, *ways))} |"

"""Memory limits, in the stages as plain objects."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deployments.answers import DecodeArguments
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.errors import ExceedsMemory
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
TRANSFORMER_GIB = 15.8e6 / 2**30
"""A limit that fits two small requests: 14.2 MB of weights, and 0.66 MB for each forward of 64 x 64. A forward of
256 x 256 takes 2.6 MB."""


def build_request(side: int, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(
        Prompt("-", None, False), side, side, 1, 20, guidance_scale=3.5, true_cfg_scale=1.0, seed=seed,
        output_format="png", output_compression=100, fps=8,
    )  # fmt: skip


def test_forwards_that_do_not_fit_now_wait_and_those_that_never_fit_are_refused() -> None:
    config = TransformerConfig(memory_limit_gib=TRANSFORMER_GIB, batch_wait_ms=50)
    stage = load_stage("denoise", MODEL, config)
    stage.connect(None, pytest.fail)
    begin = threading.Barrier(8)

    def draw(side: int, seed: int, together: bool) -> torch.Tensor:
        seat = stage.join()
        try:
            if together:
                begin.wait(30)
            request = build_request(side, seed)
            latents: torch.Tensor = stage.denoise(seat, None, request, max_sequence_length=64).latents
            return latents
        finally:
            stage.leave(seat)

    try:
        with ThreadPoolExecutor(8) as threads:
            drawn = list(threads.map(lambda seed: draw(64, seed, True), range(8)))
        assert all(latents.isfinite().all() for latents in drawn)
        assert max(stage.stats().queue.batch_sizes) == 2
        with pytest.raises(ExceedsMemory, match="256 latent positions needs"):
            draw(256, 0, False)
    finally:
        stage.close()


def test_a_vae_refuses_what_it_could_never_decode_and_goes_on() -> None:
    stage = load_stage("decode", MODEL, VaeConfig(memory_limit_gib=2e6 / 2**30))
    with pytest.raises(ExceedsMemory, match="decoding 128x128 needs"):
        stage.decode(DecodeArguments.of(torch.zeros(1, 16, 16, 16)), build_request(128))
    assert stage.decode(DecodeArguments.of(torch.zeros(1, 16, 8, 8)), build_request(64)).shape == (1, 64, 64, 3)
    assert [estimate.call for estimate in stage.residency.stats().estimates] == [
        "decoding 128x128",
        "decoding 64x64",
    ]

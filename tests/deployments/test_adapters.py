"""LoRA adapters per request, against plain diffusers with PEFT: alone and merged, over one shard and over two."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from deployments.adapter import AdapterCatalog, AdapterConfig, ScaledAdapter
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import EncoderConfig, ModelConfig
from deployments.refusal import WrongField
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage
from deployments.stages.call import call_arguments
from tests.conftest import decoded_by
from tests.deployments.lora import write_lora
from tests.deployments.variants import build_request, denoise, load_ranks, read_model
from tests.thorough import usually

FAMILIES = ["flux", "sd15", "sdxl", "sd3", "qwen-image", "wan"]
TOLERANCE = 2e-5
SCALES: tuple[tuple[tuple[str, float], ...], ...] = (
    (("a", 1.0),),
    (("b", 0.7),),
    (("a", 0.5), ("b", -0.4)),
    (),
)
"""Of four requests at once: one adapter, the other, both, none."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, AdapterConfig]]:
    """Two of a family, the first with text encoders."""

    @cache
    def write(family: str) -> dict[str, AdapterConfig]:
        checkpoint, folder = fetch_checkpoint(f"tiny://{family}", ()), tmp_path_factory.mktemp(family)
        a = write_lora(folder / "a", checkpoint, seed=1, rank=4, texts=True)
        b = write_lora(folder / "b", checkpoint, seed=2, rank=8)
        return {"a": AdapterConfig(source=str(a)), "b": AdapterConfig(source=str(b))}

    return write


def served(family: str, adapters: dict[str, AdapterConfig]) -> ModelConfig:
    return read_model(fetch_checkpoint(f"tiny://{family}", ()), adapters=adapters)


def asked(model: ModelConfig, scales: tuple[tuple[str, float], ...], seed: int = 3) -> GenerationRequest:
    catalog = AdapterCatalog(model.adapters, None)
    named = {name: catalog.find(name) for name in model.adapters}
    scaled = tuple(ScaledAdapter(adapter, scale) for name, scale in scales if (adapter := named[name]))
    request = build_request(model, num_inference_steps=4)
    return replace(request, seed=seed, adapters=scaled, prompt=Prompt(f"cat {seed}", "", is_guided=True))


def draw_plain(model: ModelConfig, request: GenerationRequest) -> torch.Tensor:
    """The latents that plain diffusers decodes, its adapters loaded by PEFT."""
    pipe: Any = DiffusionPipeline.from_pretrained(model.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for each in request.adapters:
            pipe.load_lora_weights(each.adapter.source, adapter_name=each.adapter.name)
    if request.adapters:
        names, scales = zip(*((each.adapter.name, each.scale) for each in request.adapters), strict=True)
        pipe.set_adapters(list(names), list(scales))
    with decoded_by(pipe) as decoded:
        pipe(**call_arguments(type(pipe), request, model.architecture.max_sequence_length))
    return decoded[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", usually(FAMILIES, {"flux", "sd15"}.__contains__))
def test_requests_with_different_adapters_fly_merged_and_each_is_as_alone(
    family: str, shards: int, adapters: Callable[[str], dict[str, AdapterConfig]]
) -> None:
    model = served(family, adapters(family))
    requests = [asked(model, scales, seed) for seed, scales in enumerate(SCALES)]
    encoder = load_stage("encode", model, EncoderConfig())
    encodings = encoder.encode_together([(request, None) for request in requests])
    times = shards  # over several shards fewer are merged: each is asked so often
    stage = load_ranks(model, shards=shards, batch_wait_ms=1000, max_batch_tokens=None)
    try:
        with ThreadPoolExecutor(times * len(requests)) as threads:
            answers = threads.map(lambda of: denoise(stage, *of), [*zip(encodings, requests, strict=True)] * times)
            drawn = [each.latents for each in answers]
        assert max(stage.stats().queue.batch_sizes) > 1
    finally:
        stage.close()
    expected = [draw_plain(model, request) for request in requests]
    bare = draw_plain(model, replace(requests[0], adapters=()))
    assert not torch.allclose(expected[0], bare, atol=1e-2)
    for latents, of in zip(drawn, expected * times, strict=True):
        np.testing.assert_allclose(latents.numpy(), of.numpy(), atol=TOLERANCE * float(of.abs().max()), rtol=0)

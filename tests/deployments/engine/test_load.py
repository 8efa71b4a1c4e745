"""Loads a denoiser that accelerate spreads over devices: here the CPU and, for what does not fit, the disk."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
PROMPT = Prompt("a red cat", None, is_guided=False)
REQUEST = GenerationRequest(PROMPT, 64, 64, 1, 2, 3.5, 1.0, 7, "png", 100, 16)


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
@pytest.mark.parametrize(("max_memory", "devices"), [(None, {"cpu"}), ({"cpu": "6MiB"}, {"cpu", "disk"})])
def test_a_device_map_draws_what_the_plain_pipeline_draws(
    plain: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device_map: Any,
    max_memory: dict[str, str] | None,
    devices: set[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage = load_stage("denoise", MODEL, TransformerConfig(device_map=device_map, max_memory=max_memory))
    embeds = load_stage("encode", MODEL, EncoderConfig(max_sequence_length=64)).encode(REQUEST)
    stage.connect(None, pytest.fail)
    latents = stage.denoise(stage.join(), embeds, REQUEST, on_step=lambda *_: None).latents
    assert torch.equal(latents, plain("flux", "a red cat", seed=7, num_inference_steps=2, output_type="latent"))

    [rank] = stage.stats().ranks
    assert set(rank.device_map.values()) == devices
    assert ("offloaded float32" in rank.memory.weights_bytes) == ("disk" in devices)
    assert any(tmp_path.rglob("*.dat")) == ("disk" in devices)
    stage.close()
    del stage
    gc.collect()  # hooks and modules refer to each other
    assert not list(tmp_path.iterdir()), "what lay on the disk goes with the model"

"""Each stage on a GPU gives what it gives on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

from deployments.answers import DecodeArguments, Encodings
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.families import FAMILIES
from deployments.options.resume import ResumeConfig, UnsavedPart
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.deployments.memory.tiny_request import build_request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Stages:
    """The three stages of a family, on one device."""

    def __init__(self, family: str, num_gpus: float) -> None:
        self.request = build_request(family)
        model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
        tokens = 64 if FAMILIES[family].max_sequence_length else None
        encoder = EncoderConfig(num_gpus=num_gpus, max_sequence_length=tokens)
        self._encoding = load_stage("encode", model, encoder)
        self._denoising = load_stage("denoise", model, TransformerConfig(num_gpus=num_gpus))
        self._denoising.connect(None, pytest.fail)
        self._decoding = load_stage("decode", model, VaeConfig(num_gpus=num_gpus))

    def encode(self) -> Encodings:
        return self._encoding.encode(self.request)

    def denoise(self, embeds: Any) -> torch.Tensor:
        seat = self._denoising.join()
        latents: torch.Tensor = self._denoising.denoise(
            seat, embeds, self.request, on_step=lambda *_: None
        ).latents
        self._denoising.leave(seat)
        self._denoising.close()
        return latents

    def decode(self, latents: torch.Tensor) -> Any:
        return self._decoding.decode(DecodeArguments.of(latents), self.request)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_what_the_cpu_gives(family: str) -> None:
    here, there = Stages(family, 0), Stages(family, 1)
    embeds, got = here.encode(), there.encode()
    assert {tensor.device.type for tensor in each_tensor(got)} == {"cpu"}
    torch.testing.assert_close(list(each_tensor(got)), list(each_tensor(embeds)), atol=2e-3, rtol=2e-3)
    latents, got_latents = here.denoise(embeds), there.denoise(embeds)
    assert got_latents.device.type == "cpu"
    torch.testing.assert_close(got_latents, latents, atol=2e-3, rtol=2e-3)
    frames, got_frames = here.decode(latents), there.decode(latents)
    assert np.abs(frames.astype(int) - got_frames.astype(int)).max() <= 1


def test_what_a_request_goes_on_from_is_copied_beside_its_steps() -> None:
    """Each part is copied before it is read; reading it waits for the copies."""
    resume = ResumeConfig(every_steps=1, every_s=0.0)
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    stage = load_stage("denoise", model, TransformerConfig(num_gpus=1, resume=resume))
    stage.connect(None, pytest.fail)
    unsaved: list[UnsavedPart] = []

    def save(part: UnsavedPart) -> None:
        unsaved.append(part)
        part.is_saved = True

    def draw(**given: Any) -> torch.Tensor:
        seat = stage.join()
        latents: torch.Tensor = stage.denoise(
            seat, None, build_request("flux"), max_sequence_length=32, **given
        ).latents
        stage.leave(seat)
        return latents

    try:
        unbroken = draw(on_part=save)
        parts = [part.read() for part in unsaved]
        assert parts
        assert {tensor.device.type for part in parts for tensor in each_tensor(part.forwards)} == {"cpu"}
        assert torch.equal(draw(journal=parts), unbroken)
    finally:
        stage.close()

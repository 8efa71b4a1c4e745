"""Each stage on a GPU gives what it gives on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

from deployments.config import EncoderConfig, ModelConfig, TransformerConfig, VaeConfig
from deployments.families import FAMILIES
from deployments.request import DecodeArguments, Encodings
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.deployments.memory.tiny_request import build_request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Stages:
    """The three of a family, on one device."""

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

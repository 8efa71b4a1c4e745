"""Each request has its own stream: waiting for its own copies does not wait for another request's forward."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.errors import OutOfDeviceMemory
from deployments.families import FAMILIES
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request

pytestmark = pytest.mark.pretended_gpu
GARBAGE = [0xEE] * 4


class Forwards:
    """Work that is under way on the stream that computes, like another request's forward."""

    def __init__(self) -> None:
        self._source = torch.ones(4, dtype=torch.uint8, device="cuda")
        self._host = torch.zeros(4, dtype=torch.uint8, pin_memory=True)
        torch.cuda.synchronize()

    def launch(self) -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            self._host.copy_(self._source, non_blocking=True)

    @property
    def is_under_way(self) -> bool:
        """Whether nothing has waited for the work since its launch."""
        return self._host.tolist() == GARBAGE


class Stage:
    """The denoise stage on a GPU, and embeddings for it."""

    def __init__(self, family: str, **settings: Any) -> None:
        model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
        tokens = 64 if FAMILIES[family].max_sequence_length else None
        encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=tokens))
        self._request = replace(build_request(family), num_inference_steps=3)
        self._embeds = encoding.encode(self._request)
        self.denoising = load_stage("denoise", model, TransformerConfig(num_gpus=1, **settings))
        self.denoising.connect(None, pytest.fail)

    def draw(self) -> torch.Tensor:
        seat = self.denoising.join()
        try:
            latents: torch.Tensor = self.denoising.denoise(
                seat, self._embeds, self._request, on_step=lambda *_: None
            ).latents
        finally:
            self.denoising.leave(seat)
        return latents


@pytest.mark.parametrize("family", ["flux", "sd15", "wan"])
def test_what_a_request_waits_for_is_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request waits for no other one before its first forward, between any two, and after the last."""
    stage, others, waited = Stage(family), Forwards(), []
    engine = stage.denoising.engine
    begin = engine.begin

    def watched(*args: Any, **options: Any) -> Callable[[], Any]:
        waited.append(not others.is_under_way)
        wait = begin(*args, **options)

        def watched_wait() -> Any:
            output = wait()
            others.launch()
            return output

        return watched_wait

    monkeypatch.setattr(engine, "begin", watched)
    others.launch()
    stage.draw()
    waited.append(not others.is_under_way)
    stage.denoising.close()
    assert len(waited) > 3
    assert not any(waited)


def test_what_a_request_is_at_work_on_is_not_used_again_by_anothers_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request drops a prediction while the GPU still reads it; the next forward must get other memory."""
    stage = Stage("flux")
    engine = stage.denoising.engine
    begin = engine.begin

    def lets_go(*args: Any, **options: Any) -> Callable[[], tuple[torch.Tensor]]:
        wait = begin(*args, **options)

        def wait_and_let_go() -> tuple[torch.Tensor]:
            [prediction] = wait()
            time.sleep(0.05)  # until the engine has dropped it
            used = prediction.clone()
            del prediction
            with torch.cuda.stream(torch.cuda.default_stream()):
                torch.empty(1, device="cuda")
            return (used,)

        return wait_and_let_go

    expected = stage.draw()
    monkeypatch.setattr(engine, "begin", lets_go)
    assert torch.equal(stage.draw(), expected)
    stage.denoising.close()


def test_a_request_whose_own_tensors_find_no_room_is_told_so() -> None:
    stage = Stage("flux")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / total)
    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        stage.draw()
    torch.cuda.set_per_process_memory_fraction(1.0)
    stage.draw()
    stage.denoising.close()

"""On a GPU: techniques that move weights change no image, and weights that are unloaded free their memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request
from tests.tiny_models import EXPERTS, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("own_leases"),
]

STREAMED = {"kind": "group", "use_stream": True}
WAYS: tuple[dict[str, Any], ...] = (
    {"offload": "model"},
    {"offload": "sequential"},
    {"offload": "group"},
    {"offload": STREAMED},
    {"offload": {**STREAMED, "level": "block", "record_stream": True}},
    {"offload": {**STREAMED, "low_cpu_memory": True}},
    {"offload": {"kind": "group", "folder": "/tmp"}},
    {"time_sharing": True},
    {"vram_limit_gib": 1e-3},
    {"vram_limit_gib": 1e-3, "time_sharing": True},
    {"vram_limit_gib": 1e-3, "layerwise_casting": True},
    {"layerwise_casting": True, "offload": STREAMED},
    {"quantization": "nf4", "offload": "model"},
    {"quantization": "nf4", "offload": STREAMED},
    {"quantization": "nf4", "offload": {"kind": "group", "folder": "/tmp"}},
    {"quantization": "nf4", "time_sharing": True},
    {"quantization": "nf4", "compile": True},
    {"quantization": "nf4", "compile": True, "offload": "model"},
    {"quantization": "nf4", "compile": True, "offload": STREAMED},
    {"quantization": "int8", "offload": "model"},
    {"quantization": "int8", "time_sharing": True},
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="for a GPU, inductor needs Triton")
CHANGES_WEIGHTS = {"quantization", "layerwise_casting"}


class Stage:
    """The denoise stage of a tiny checkpoint on the GPU."""

    def __init__(self, name: str = "flux", **settings: Any) -> None:
        config = TransformerConfig(num_gpus=1, dtype="bfloat16", **settings)
        self._name, self.denoising = name, load_stage("denoise", tiny_model(name), config)
        self.denoising.connect(None, pytest.fail)

    def draw(self, on_step: Any = lambda *_: None, **changes: Any) -> torch.Tensor:
        seat, request = self.denoising.join(), replace(build_request(self._name), **changes)
        try:
            latents: torch.Tensor = self.denoising.denoise(seat, embeds(self._name), request, on_step).latents
        finally:
            self.denoising.leave(seat)
        return latents


@cache
def embeds(name: str) -> Any:
    config = EncoderConfig(max_sequence_length=64)
    return load_stage("encode", tiny_model(name), config).encode(build_request(name))


@pytest.mark.parametrize(
    "settings",
    [pytest.param(way, marks=needs_triton) if "compile" in way else way for way in WAYS],
    ids=str,
)
def test_what_moves_weights_draws_what_the_same_weights_draw_at_rest(settings: dict[str, Any]) -> None:
    """Draws twice: the second time weights have left and returned, and layers are fetched ahead."""
    plain = Stage(**{key: value for key, value in settings.items() if key in CHANGES_WEIGHTS})
    expected = plain.draw()
    plain.denoising.close()
    stage = Stage(**settings)
    for _ in range(2):
        torch.testing.assert_close(stage.draw(), expected, atol=0.1, rtol=0.1)  # bf16; other kernels if compiled
    stage.denoising.close()


EXPERTS_WAYS: tuple[dict[str, Any], ...] = (
    {"offload": "model"},
    {"offload": "group"},
    {"offload": STREAMED},
    {"time_sharing": True},
    {"vram_limit_gib": 1e-3},
    {"quantization": "nf4", "offload": "model"},
    {"quantization": "int8", "offload": "model"},
)


@pytest.mark.parametrize("settings", EXPERTS_WAYS, ids=str)
def test_two_experts_draw_what_they_draw_at_rest(settings: dict[str, Any]) -> None:
    """Draws two requests at once, which alternate between the experts."""
    plain = Stage(EXPERTS, **{key: value for key, value in settings.items() if key in CHANGES_WEIGHTS})
    steps = (4, 9)
    expected = [plain.draw(num_inference_steps=number) for number in steps]
    plain.denoising.close()
    stage = Stage(EXPERTS, max_batch_size=1, **settings)
    for _ in range(2):
        with ThreadPoolExecutor(2) as threads:
            drawn = threads.map(lambda number: stage.draw(num_inference_steps=number), steps)
            for latents, wanted in zip(drawn, expected, strict=True):
                torch.testing.assert_close(latents, wanted, atol=0.1, rtol=0.1)
    stage.denoising.close()


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_one_expert_at_a_time_is_on_the_gpu_whichever_was_there_before(kind: str | None) -> None:
    stage = Stage(EXPERTS, offload="model", quantization=kind)
    models = {name: shard.model for name, shard in stage.denoising.loaded.shards.items()}
    there: list[set[str]] = []

    def note(*_: Any) -> None:
        devices = {name: next(model.parameters()).device.type for name, model in models.items()}
        there.append({name for name, device in devices.items() if device == "cuda"})

    for model in models.values():
        model.register_forward_hook(note)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda number: stage.draw(num_inference_steps=number), (4, 9)))
    stage.denoising.close()
    assert all(len(names) == 1 for names in there)
    assert set().union(*there) == set(models)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_a_model_that_is_offloaded_is_gone_from_the_gpu_when_idle(kind: str | None) -> None:
    before = allocated_bytes()
    stage = Stage(offload="model", quantization=kind)
    weights = sum(stage.denoising.stats().ranks[0].memory.weights_bytes.values())
    for _ in range(2):
        stage.draw()
        deadline = time.monotonic() + 10
        while allocated_bytes() - before > weights / 10:
            assert time.monotonic() < deadline, "it stays"
            time.sleep(0.05)
    stage.denoising.close()


def allocated_bytes() -> int:
    """Returns the allocated memory without the workspaces of cuBLAS, which are larger than the tiny model."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_8_bit_layers_say_nothing_at_their_forwards(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes would warn about bfloat16 in every layer: 14,000 lines for an image of FLUX."""
    stage = Stage(quantization="int8")
    stage.draw()
    stage.denoising.close()
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_quantised_layers_are_weighed_once_and_have_no_device_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the scales of quantised layers waits for the GPU, one layer after another."""
    stage = Stage(quantization={"kind": "nf4", "double_quant": True})
    [before] = stage.denoising.stats().ranks
    monkeypatch.setattr(
        stage.denoising.loaded.shards["transformer"].model, "state_dict", lambda **_: pytest.fail("asked again")
    )
    [after] = stage.denoising.stats().ranks
    stage.denoising.close()
    assert after.memory.weights_bytes == before.memory.weights_bytes
    assert before.device_map is None

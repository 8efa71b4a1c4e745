"""Stages that share a device's time: at most one has its weights there, and images are the same."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.memory.time_sharing import HostCopies
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limit, fp8": {"vram_limit_gib": 1e-4, "layerwise_casting": True},
    "nf4": {"quantization": "nf4"},
    "compile": {"compile": {"backend": "eager"}},
}


pytestmark = pytest.mark.usefixtures("own_leases")


class Pipeline:
    """The three stages of a tiny checkpoint in this process, with settings for all of them."""

    def __init__(self, family: str, **settings: Any) -> None:
        self.family, model = family, ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
        self.encoding = load_stage("encode", model, EncoderConfig(**settings))
        self.denoising = load_stage("denoise", model, TransformerConfig(**settings))
        self.denoising.connect(None, pytest.fail)
        self.decoding = load_stage("decode", model, VaeConfig(**settings))

    def draw(self) -> Any:
        request = build_request(self.family)
        embeds = self.encoding.encode(request)
        self.check_places("encode")
        seat = self.denoising.join()
        arguments = self.denoising.denoise(seat, embeds, request)
        self.denoising.leave(seat)
        self.check_places("denoise")
        frames = self.decoding.decode(arguments, request)
        self.check_places("decode")
        return frames

    def residencies(self) -> dict[str, Any]:
        loaded = self.denoising.loaded
        return {"encode": self.encoding.residency, "denoise": loaded.residency, "decode": self.decoding.residency}

    def check_places(self, there: str) -> None:
        """Checks that, of the stages that share time, only this one has its weights on the device."""
        for name, residency in self.residencies().items():
            stats = residency.stats()
            if stats.lease is not None:
                devices = {place.partition(" ")[0] for place in stats.weights_bytes}
                assert devices == {"cpu" if name == there else "offloaded"}


class Model(nn.Module):
    """A model of two layers that share their weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.two(self.one(x)) + self.shift)


def test_weights_come_as_copies_and_leave_to_what_they_were() -> None:
    model, x = Model(), torch.ones(1, 8)
    expected, home = model(x), places(model)
    weights = HostCopies(model, torch.device("cpu"))
    for _ in range(2):
        weights.load()
        assert not home & places(model)
        assert model.one.weight is model.two.weight
        assert torch.equal(model(x), expected)
        weights.unload()
        assert places(model) == home


def places(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.slow
@pytest.mark.usefixtures("quantize_on_cpu")
@pytest.mark.parametrize("name", SETTINGS)
def test_stages_that_share_time_draw_the_same_picture(name: str) -> None:
    """Repeated draws are equal, and compile nothing again."""
    alike = {key: value for key, value in SETTINGS[name].items() if key != "compile"}  # eager: the same sums
    expected = Pipeline("sd15", **alike).draw()
    sharing = Pipeline("sd15", **SETTINGS[name], time_sharing=True)
    assert (sharing.draw() == expected).all()
    num_graphs = counters["stats"]["unique_graphs"]
    assert (sharing.draw() == expected).all()
    assert counters["stats"]["unique_graphs"] == num_graphs
    for residency in sharing.residencies().values():
        lease = residency.stats().lease
        assert lease.num_leases == 2
        assert lease.loading_s > 0
        assert "time_sharing" in residency.applied
    sharing.denoising.close()

"""What the memory techniques do to a model, apart from the images that it draws."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.hooks import HookRegistry

from deployments.answers import DecodeArguments
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.memory.compile import copied
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.deployments.memory.tiny_request import build_request

pytestmark = pytest.mark.usefixtures("own_leases")


def model(family: str) -> ModelConfig:
    return ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image", "wan"])
def test_an_encoder_with_weights_in_8_bits_gives_embeddings_in_its_own_dtype(family: str) -> None:
    """transformers takes the dtype of a model from its first weight, and pipelines cast their results to that."""
    config = EncoderConfig(layerwise_casting=True, dtype="bfloat16", max_sequence_length=64)
    stage = load_stage("encode", model(family), config)
    assert any("float8" in place for place in stage.residency.stats().weights_bytes)
    found = {value.dtype for value in each_tensor(stage.encode(build_request(family)))}
    assert torch.bfloat16 in found
    assert not [dtype for dtype in found if dtype.itemsize == 1 and dtype.is_floating_point]


@pytest.mark.parametrize("family", ["flux", "qwen-image", "wan"])
def test_a_vae_that_moves_by_blocks_is_hooked_where_it_is_called(family: str) -> None:
    """The VAE's `decode` calls the decoder, and never the VAE's own `forward`."""
    stage = load_stage("decode", model(family), VaeConfig(offload={"kind": "group", "level": "block"}))
    decoder = stage._pipe.vae.decoder
    assert HookRegistry.check_if_exists_or_initialize(decoder).get_hook("group_offloading") is not None


def test_a_stage_that_has_failed_gives_its_lease_up() -> None:
    """Otherwise the next stage would wait for as long as a lease may last."""
    config = VaeConfig(time_sharing={"time_slice_s": 600})
    failing, waiting = (load_stage("decode", model("flux"), config) for _ in range(2))
    with pytest.raises(RuntimeError):
        failing.decode(DecodeArguments.of(torch.zeros(1, 7, 8, 8)), build_request("flux"))
    with ThreadPoolExecutor(1) as thread:
        decoding = thread.submit(
            waiting.decode, DecodeArguments.of(torch.zeros(1, 16, 8, 8)), build_request("flux")
        )
        assert decoding.result(timeout=30).shape == (1, 64, 64, 3)


def test_what_a_cuda_graph_gives_is_not_what_its_next_call_overwrites() -> None:
    buffer = torch.zeros(3)

    def replay(value: float) -> tuple[torch.Tensor]:
        return (buffer.fill_(value),)

    call = copied(replay)
    [first], [second] = call(1.0), call(2.0)
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [2.0] * 3)

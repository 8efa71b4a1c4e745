"""A stage that shares another checkpoint's models computes what its own would compute, bit for bit."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from deployments.answers import DecodeArguments
from deployments.checkpoints.sharing import NotTheSame
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from deployments.stages.warm_up import default_request, tried_size
from tests.deployments.variants import read_model

ENCODER, VAE = EncoderConfig(max_sequence_length=16), VaeConfig()


@cache
def model(name: str) -> ModelConfig:
    return read_model(fetch_checkpoint(f"tiny://{name}", ()))


@pytest.fixture
def flux() -> ModelConfig:
    return model("flux")


@pytest.fixture
def kontext() -> ModelConfig:
    return model("flux-kontext")


def weights(stage: Any) -> set[int]:
    """Returns the addresses of the weights."""
    parts = [part for part in stage._pipe.components.values() if issubclass(type(part), torch.nn.Module)]
    return {p.data_ptr() for part in parts for p in part.parameters() if not p.is_meta}


def test_shared_text_encoders_encode_as_their_own_would(flux: ModelConfig, kontext: ModelConfig) -> None:
    owner = load_stage("encode", flux, ENCODER)
    sharing, own = load_stage("encode", kontext, ENCODER, (flux, owner)), load_stage("encode", kontext, ENCODER)
    request = default_request(kontext, tried_size(kontext.geometry))
    request = dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, text="a red fox"))
    made, expected = sharing.encode(request), own.encode(request)
    assert [name for name, _ in made] == [name for name, _ in expected]
    for one, other in zip(each_tensor(made), each_tensor(expected), strict=True):
        assert torch.equal(one, other)
    assert weights(sharing) == weights(owner)
    assert weights(own).isdisjoint(weights(owner))


def test_a_shared_vae_decodes_as_its_own_would(flux: ModelConfig, kontext: ModelConfig) -> None:
    owner = load_stage("decode", flux, VAE)
    sharing, own = load_stage("decode", kontext, VAE, (flux, owner)), load_stage("decode", kontext, VAE)
    request = default_request(kontext, tried_size(kontext.geometry))
    blank = own._blank(request.size).calls[0].args[0]
    latents = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0), dtype=blank.dtype)
    made, expected = (stage.decode(DecodeArguments.of(latents), request) for stage in (sharing, own))
    assert (made == expected).all()
    assert weights(sharing) == weights(owner)


def test_what_is_not_the_same_is_not_shared(flux: ModelConfig) -> None:
    with pytest.raises(NotTheSame, match="text_encoder_3"):
        load_stage("encode", model("sd3"), ENCODER, (flux, load_stage("encode", flux, ENCODER)))

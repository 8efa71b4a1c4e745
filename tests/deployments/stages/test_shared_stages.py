"""A stage whose models another checkpoint's has loaded does what one of its own does, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch

from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.sharing import NotTheSame
from deployments.checkpoints.source import with_family
from deployments.config import EncoderConfig, ModelConfig, VaeConfig
from deployments.request import DecodeArguments
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from deployments.warm_up import default_request, tried_size

ENCODER, VAE = EncoderConfig(max_sequence_length=16), VaeConfig()


def model(name: str) -> ModelConfig:
    return with_geometry(with_family(ModelConfig(name=name, checkpoint=f"tiny://{name}")))


FLUX, KONTEXT = model("flux"), model("flux-kontext")


def weights(stage: Any) -> set[int]:
    """Where they lie."""
    parts = [part for part in stage._pipe.components.values() if issubclass(type(part), torch.nn.Module)]
    return {p.data_ptr() for part in parts for p in part.parameters() if not p.is_meta}


def test_shared_text_encoders_encode_as_their_own_would() -> None:
    holder = load_stage("encode", FLUX, ENCODER)
    sharing, own = load_stage("encode", KONTEXT, ENCODER, (FLUX, holder)), load_stage("encode", KONTEXT, ENCODER)
    request = default_request(KONTEXT, tried_size(KONTEXT.geometry))
    request = dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, text="a red fox"))
    made, expected = sharing.encode(request), own.encode(request)
    assert [name for name, _ in made] == [name for name, _ in expected]
    for one, other in zip(each_tensor(made), each_tensor(expected), strict=True):
        assert torch.equal(one, other)
    assert weights(sharing) == weights(holder)
    assert weights(own).isdisjoint(weights(holder))


def test_a_shared_vae_decodes_as_its_own_would() -> None:
    holder = load_stage("decode", FLUX, VAE)
    sharing, own = load_stage("decode", KONTEXT, VAE, (FLUX, holder)), load_stage("decode", KONTEXT, VAE)
    request = default_request(KONTEXT, tried_size(KONTEXT.geometry))
    blank = own._blank(request.size).calls[0].args[0]
    latents = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0), dtype=blank.dtype)
    made, expected = (stage.decode(DecodeArguments.of(latents), request) for stage in (sharing, own))
    assert (made == expected).all()
    assert weights(sharing) == weights(holder)


def test_what_is_not_the_same_is_not_shared() -> None:
    with pytest.raises(NotTheSame, match="text_encoder_3"):
        load_stage("encode", model("sd3"), ENCODER, (FLUX, load_stage("encode", FLUX, ENCODER)))

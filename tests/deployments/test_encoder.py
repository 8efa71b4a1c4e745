"""The encode stage's deployment, as a plain object without a cluster."""

import asyncio
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.answers import Conditioning
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.encoder import Encoder
from deployments.families import FAMILIES
from deployments.options.qos import Qos
from deployments.request import GenerationRequest, Prompt
from deployments.stages.stats import EncoderStats
from deployments.stages.tensors import each_tensor
from tests.deployments.held import ended_in

MODEL = ModelConfig(name="tiny", checkpoint="tiny://sd15", family="sd15")
CAT = GenerationRequest(
    Prompt("a cat", "blurry", is_guided=True), 64, 64, 1, 2, guidance_scale=5.0, true_cfg_scale=1.0, seed=0,
    output_format="png", output_compression=100, fps=8,
)  # fmt: skip
IMPOSSIBLE = replace(CAT, prompt=Prompt("\ud800", None, is_guided=False))
"""A prompt with a lone surrogate, which no tokenizer accepts."""


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(MODEL, EncoderConfig())


def tensors(conditioning: Conditioning) -> list[torch.Tensor]:
    return list(each_tensor(conditioning.encodings))


def stats(encoder: Encoder) -> EncoderStats:
    return asyncio.run(encoder.stats())


def test_a_repeated_prompt_costs_no_forward(encoder: Encoder) -> None:
    first, second = (asyncio.run(encoder.encode(CAT)) for _ in range(2))
    assert all(one is other for one, other in zip(tensors(second), tensors(first), strict=True))
    assert (stats(encoder).num_forwards, stats(encoder).num_cache_hits) == (1, 1)


def test_the_stats_tell_how_much_is_cached(encoder: Encoder) -> None:
    conditioning = asyncio.run(encoder.encode(CAT))
    num_bytes = sum(tensor.nbytes for tensor in tensors(conditioning))
    assert (stats(encoder).num_cached, stats(encoder).cached_bytes) == (1, num_bytes)


def test_equal_prompts_at_the_same_time_share_one_forward(encoder: Encoder) -> None:
    async def at_once() -> None:
        one, *others = await asyncio.gather(*(encoder.encode(CAT) for _ in range(5)))
        assert all(tensors(other)[0] is tensors(one)[0] for other in others)

    asyncio.run(at_once())
    assert stats(encoder).num_forwards == 1


def test_one_prompt_waits_for_no_crowd() -> None:
    encoder = Encoder(MODEL, EncoderConfig(max_batch_size=1))
    asked = [("crowd", Qos(share="crowd"))] * 6 + [("alone", Qos(share="alone")), ("high", Qos("high"))]
    requests = [replace(CAT, prompt=replace(CAT.prompt, text=f"a cat and {i} dogs")) for i in range(len(asked))]
    calls = [
        (name, encoder.encode(request, None, qos)) for request, (name, qos) in zip(requests, asked, strict=True)
    ]
    order = asyncio.run(ended_in(encoder._executor, calls))
    assert {"alone", "high"} < set(order[:4])
    assert order[4:] == ["crowd"] * 4


def test_what_the_encoder_raises_knows_its_stage(encoder: Encoder) -> None:
    """The error is raised by the denoiser's call, which takes the encoder's answer as an argument."""
    with pytest.raises(TypeError) as raised:
        asyncio.run(encoder.encode(IMPOSSIBLE))
    assert pickle.loads(pickle.dumps(raised.value)).stage == "encode"


def test_another_negative_prompt_is_another_forward_with_another_result(encoder: Encoder) -> None:
    dark = replace(CAT, prompt=replace(CAT.prompt, negative_text="dark"))
    one, other = (tensors(asyncio.run(encoder.encode(request))) for request in (CAT, dark))
    assert stats(encoder).num_forwards == 2
    assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [True, False]


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"num_inference_steps": 5}, {"width": 128}, {"guidance_scale": 3.0}]
)
def test_the_same_texts_at_another_size_or_in_other_steps_cost_no_forward(
    encoder: Encoder, changes: dict[str, Any]
) -> None:
    asyncio.run(encoder.encode(CAT))
    asyncio.run(encoder.encode(replace(CAT, **changes)))
    assert (stats(encoder).num_forwards, stats(encoder).num_cache_hits) == (1, 1)


def test_what_cannot_be_drawn_is_left_to_the_denoise_stage_to_tell(encoder: Encoder) -> None:
    """The encode stage runs the pipeline's own checks too, but does not know which field is wrong."""
    assert asyncio.run(encoder.encode(replace(CAT, width=63))).encodings == ()


def test_a_failed_encode_raises_and_is_not_remembered(encoder: Encoder) -> None:
    for num_forwards in (1, 2):
        with pytest.raises(TypeError):
            asyncio.run(encoder.encode(IMPOSSIBLE))
        assert (stats(encoder).num_forwards, stats(encoder).num_cached) == (num_forwards, 0)
    asyncio.run(encoder.encode(CAT))
    assert stats(encoder).num_cache_hits == 0


def test_a_client_that_leaves_takes_nothing_from_the_others(encoder: Encoder) -> None:
    async def one_leaves() -> None:
        leaving, staying = (asyncio.create_task(encoder.encode(CAT)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        conditioning = await staying
        assert tensors(conditioning)
        assert leaving.cancelled()

    asyncio.run(one_leaves())
    assert stats(encoder).num_forwards == 1


def test_without_a_cache_every_prompt_is_encoded() -> None:
    encoder = Encoder(MODEL, EncoderConfig(cache_mib=0))
    one, other = (asyncio.run(encoder.encode(CAT)) for _ in range(2))
    assert stats(encoder).num_forwards == 2
    assert torch.equal(tensors(one)[0], tensors(other)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_cpu_tensors_that_can_be_sent_without_a_copy(family: str) -> None:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    made = tensors(asyncio.run(Encoder(model, EncoderConfig()).encode(CAT)))
    assert made
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in made)
    assert not any(value.requires_grad for value in made)


def test_max_sequence_length_bounds_the_text_tokens() -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    encoder = Encoder(model, EncoderConfig(max_sequence_length=24))
    assert tensors(asyncio.run(encoder.encode(CAT)))[0].shape[:2] == (1, 24)

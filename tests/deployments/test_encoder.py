"""The encode stage's deployment, as a plain object without a cluster."""

import asyncio
import pickle

import pytest
import torch

from deployments.config import EncoderConfig, ModelConfig
from deployments.encoder import Encoder
from deployments.families import FAMILIES
from deployments.request import Prompt
from deployments.stats import EncoderStats

MODEL = ModelConfig(name="tiny", checkpoint="tiny://sd15", family="sd15")
CAT = Prompt("a cat", "blurry", is_guided=True)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(MODEL, EncoderConfig())


def stats(encoder: Encoder) -> EncoderStats:
    return asyncio.run(encoder.stats())


def test_a_repeated_prompt_costs_no_forward(encoder: Encoder) -> None:
    first, second = (asyncio.run(encoder.encode(CAT)) for _ in range(2))
    assert second.embeds is first.embeds
    assert (stats(encoder).num_forwards, stats(encoder).num_cache_hits) == (1, 1)


def test_the_stats_tell_how_much_is_cached(encoder: Encoder) -> None:
    embeds = asyncio.run(encoder.encode(CAT)).embeds
    num_bytes = sum(value.nbytes for value in embeds.values() if value is not None)
    assert (stats(encoder).num_cached, stats(encoder).cached_bytes) == (1, num_bytes)


def test_equal_prompts_at_the_same_time_share_one_forward(encoder: Encoder) -> None:
    async def at_once() -> None:
        one, *others = await asyncio.gather(*(encoder.encode(CAT) for _ in range(5)))
        assert all(other.embeds is one.embeds for other in others)

    asyncio.run(at_once())
    assert stats(encoder).num_forwards == 1


def test_what_the_encoder_raises_knows_its_stage(encoder: Encoder) -> None:
    """It comes out of the denoiser's call, which is given the encoder's answer."""
    with pytest.raises(AttributeError, match=r"no attribute .shape.") as raised:
        asyncio.run(encoder.encode(Prompt(7, None, is_guided=False)))  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(raised.value)).stage == "encode"


def test_another_negative_prompt_is_another_forward_with_another_result(encoder: Encoder) -> None:
    dark = Prompt(CAT.text, "dark", is_guided=True)
    one, other = (asyncio.run(encoder.encode(prompt)).embeds for prompt in (CAT, dark))
    assert stats(encoder).num_forwards == 2
    assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])
    assert not torch.equal(one["negative_prompt_embeds"], other["negative_prompt_embeds"])


def test_a_failed_encode_raises_and_is_not_remembered(encoder: Encoder) -> None:
    impossible = Prompt(7, None, is_guided=False)  # type: ignore[arg-type]
    for num_forwards in (1, 2):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            asyncio.run(encoder.encode(impossible))
        assert (stats(encoder).num_forwards, stats(encoder).num_cached) == (num_forwards, 0)
    asyncio.run(encoder.encode(CAT))
    assert stats(encoder).num_cache_hits == 0


def test_a_client_that_leaves_takes_nothing_from_the_others(encoder: Encoder) -> None:
    async def one_leaves() -> None:
        leaving, staying = (asyncio.create_task(encoder.encode(CAT)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        conditioning = await staying
        assert conditioning.embeds["prompt_embeds"] is not None
        assert leaving.cancelled()

    asyncio.run(one_leaves())
    assert stats(encoder).num_forwards == 1


def test_without_a_cache_every_prompt_is_encoded() -> None:
    encoder = Encoder(MODEL, EncoderConfig(cache_mib=0))
    one, other = (asyncio.run(encoder.encode(CAT)) for _ in range(2))
    assert stats(encoder).num_forwards == 2
    assert torch.equal(one.embeds["prompt_embeds"], other.embeds["prompt_embeds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_cpu_tensors_that_can_be_sent_without_a_copy(family: str) -> None:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    conditioning = asyncio.run(Encoder(model, EncoderConfig()).encode(CAT))
    tensors = [value for value in conditioning.embeds.values() if value is not None]
    assert tensors
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in tensors)
    assert not any(value.requires_grad for value in tensors)


def test_max_sequence_length_bounds_the_text_tokens() -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    encoder = Encoder(model, EncoderConfig(max_sequence_length=24))
    assert asyncio.run(encoder.encode(CAT)).embeds["prompt_embeds"].shape[:2] == (1, 24)

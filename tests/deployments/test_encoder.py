"""The encode deployment, constructed without a cluster."""

import asyncio

import pytest

from deployments.config import EncoderConfig, ModelConfig
from deployments.encoder import Encoder
from deployments.request import Prompt

MODEL = ModelConfig(name="tiny", checkpoint="tiny://sd15")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(MODEL, "sd15", EncoderConfig())


def test_a_repeated_prompt_costs_no_forward(encoder: Encoder) -> None:
    async def scenario() -> None:
        first = await encoder.encode(Prompt("a", None, True))
        forwards = (await encoder.stats()).num_forwards
        second = await encoder.encode(Prompt("a", None, True))
        assert (first.is_cached, second.is_cached) == (False, True)
        assert second.embeds is first.embeds
        assert (await encoder.stats()).num_forwards == forwards

    asyncio.run(scenario())


def test_equal_prompts_at_the_same_time_share_one_forward(encoder: Encoder) -> None:
    async def scenario() -> None:
        before = (await encoder.stats()).num_forwards
        answers = await asyncio.gather(*(encoder.encode(Prompt("together", None, True)) for _ in range(5)))
        assert (await encoder.stats()).num_forwards == before + 1
        assert len({id(answer.embeds) for answer in answers}) == 1

    asyncio.run(scenario())


def test_one_of_them_leaving_does_not_cancel_it_for_the_others(encoder: Encoder) -> None:
    async def scenario() -> None:
        prompt = Prompt("one leaves", None, True)
        leaver, stayer = (asyncio.create_task(encoder.encode(prompt)) for _ in range(2))
        await asyncio.sleep(0)
        leaver.cancel()
        assert (await stayer).embeds["prompt_embeds"] is not None

    asyncio.run(scenario())


def test_a_failed_encode_is_not_remembered(encoder: Encoder) -> None:
    async def scenario() -> None:
        broken = Prompt(3, None, True)  # type: ignore[arg-type]
        for _ in range(2):
            before = (await encoder.stats()).num_forwards
            with pytest.raises(AttributeError, match="shape"):
                await encoder.encode(broken)
            assert (await encoder.stats()).num_forwards == before + 1

    asyncio.run(scenario())

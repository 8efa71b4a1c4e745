"""Tests of answers made of server-sent events, without a server."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.answers import Progress
from deployments.request import GenerationRequest, Prompt
from serve_app.errors import Overloaded
from serve_app.flow.events import Event
from serve_app.http.sse import answer_with_events

REQUEST = GenerationRequest(Prompt("a cat", None, False), 64, 32, 1, 4, None, None, 0, "png", 100, 1)
STEP = Event(0, Progress(1, 4, 0.5))


async def happen(*events: Event | Exception | None) -> AsyncGenerator[Event | None, None]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def body(*events: Event | Exception | None) -> list[str]:
    """Returns the frames of the answer."""

    async def collect() -> list[Any]:
        answer = await answer_with_events(happen(*events), REQUEST)
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [frame async for frame in answer.body_iterator]

    return [frame.decode() for frame in asyncio.run(collect())]


def test_an_event_has_its_type_as_name_and_ends_with_a_blank_line() -> None:
    [frame] = body(STEP)
    name, data = frame.removesuffix("\n\n").split("\n")
    assert name == "event: image_generation.progress"
    told = json.loads(data.removeprefix("data: "))
    assert told.pop("created_at") > 1_700_000_000
    assert told == {
        "type": "image_generation.progress",
        "index": 0,
        "phase": "denoise",
        "step": 1,
        "num_steps": 4,
        "eta_s": 0.5,
    }


def test_silence_is_a_comment_that_clients_skip() -> None:
    assert body(None, STEP, None)[::2] == [": ping\n\n"] * 2


def test_an_error_before_the_first_event_is_raised() -> None:
    with pytest.raises(Overloaded):
        body(Overloaded("too many"))


@pytest.mark.parametrize(
    ("error", "message"),
    [(Overloaded("too many"), "too many"), (KeyError("oh"), "internal error: KeyError: 'oh'")],
)
def test_a_later_error_is_the_last_event_in_openais_form(error: Exception, message: str) -> None:
    _, frame = body(STEP, error)
    name, data = frame.removesuffix("\n\n").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == message

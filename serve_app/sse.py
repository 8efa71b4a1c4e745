"""Server-sent events: what happens to a request, in OpenAI's events and ours, and an answer made of them."""

import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from deployments.request import GenerationRequest, Progress
from serve_app.errors import as_relay_error
from serve_app.generation import Event
from serve_app.openai_api import (
    CompletedEvent,
    EditCompletedEvent,
    EditPartialImageEvent,
    EditProgressEvent,
    ImageEvent,
    PartialImageEvent,
    ProgressEvent,
)
from serve_app.partials import PartialImage

HEARTBEAT_S = 15.0
"""Proxies cut a connection that says nothing for longer: nginx after 60 s."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""The second asks nginx not to collect the events before it sends them."""


async def answer_with_events(
    events: AsyncGenerator[Event | None, None], request: GenerationRequest
) -> EventSourceResponse:
    """Waits for the first event or heartbeat, so that an error before it is an ordinary HTTP error: it is raised.

    request: any of the pictures'; they differ in their seeds.
    """
    first = await anext(events)
    return EventSourceResponse(_frames(first, events, request), headers=HEADERS)


async def _frames(
    first: Event | None, events: AsyncGenerator[Event | None, None], request: GenerationRequest
) -> AsyncIterator[bytes]:
    """The answer's bytes; a late error is an event, too, at which OpenAI's client raises APIError."""
    async with aclosing(events):
        yield _frame(first, request)
        try:
            async for event in events:
                yield _frame(event, request)
        except Exception as error:
            yield format_sse_event(event="error", data_str=json.dumps(as_relay_error(error).body()))


def _frame(event: Event | None, request: GenerationRequest) -> bytes:
    if event is None:
        return KEEPALIVE_COMMENT
    told = describe_event(event, request)
    return format_sse_event(event=told.type, data_str=told.model_dump_json())


def describe_event(event: Event, request: GenerationRequest) -> ImageEvent:
    """The event as clients see it."""
    news, now, is_edit = event.news, int(time.time()), request.kind != "generate"
    if isinstance(news, Progress):
        progress_event = EditProgressEvent if is_edit else ProgressEvent
        return progress_event(created_at=now, index=event.index, **vars(news))
    media = {
        "created_at": now,
        "index": event.index,
        "b64_json": base64.b64encode(news.media.data).decode(),
        "size": f"{request.width}x{request.height}",
        "output_format": request.output_format,
    }
    if isinstance(news, PartialImage):
        partial_event = EditPartialImageEvent if is_edit else PartialImageEvent
        return partial_event(**media, partial_image_index=news.partial_image_index)
    completed_event = EditCompletedEvent if is_edit else CompletedEvent
    return completed_event(**media, quality=news.quality, **news.facts)

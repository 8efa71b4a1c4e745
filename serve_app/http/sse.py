"""Server-sent events: the events of a request in OpenAI's format and in this project's, and an answer that streams
them."""

import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from deployments.answers import Progress
from deployments.request import GenerationRequest
from serve_app.errors import as_relay_error
from serve_app.flow.events import Event
from serve_app.flow.partials import PartialImage
from serve_app.http.openai_answers import (
    CompletedEvent,
    EditCompletedEvent,
    EditPartialImageEvent,
    EditProgressEvent,
    ImageEvent,
    PartialImageEvent,
    ProgressEvent,
)

HEARTBEAT_S = 15.0
"""Proxies close a connection that is silent for longer: nginx after 60 s."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""The second header asks nginx not to buffer events."""


async def answer_with_events(
    events: AsyncGenerator[Event | None, None], request: GenerationRequest
) -> EventSourceResponse:
    """Waits for the first event or heartbeat, so that an earlier error is raised and becomes an ordinary HTTP
    error.

    request: that of any image; they differ only in their seeds.
    """
    first = await anext(events)
    return EventSourceResponse(_frames(first, events, request), headers=HEADERS)


async def _frames(
    first: Event | None, events: AsyncGenerator[Event | None, None], request: GenerationRequest
) -> AsyncIterator[bytes]:
    """Yields the answer's bytes. A later error is an event too, on which OpenAI's client raises APIError."""
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
    """Returns the event as clients see it."""
    payload, now, is_edit = event.payload, int(time.time()), request.kind != "generate"
    if isinstance(payload, Progress):
        progress_event = EditProgressEvent if is_edit else ProgressEvent
        return progress_event(created_at=now, index=event.index, **vars(payload))
    media = {
        "created_at": now,
        "index": event.index,
        "b64_json": base64.b64encode(payload.media.data).decode(),
        "size": f"{request.width}x{request.height}",
        "output_format": request.output_format,
    }
    if isinstance(payload, PartialImage):
        partial_event = EditPartialImageEvent if is_edit else PartialImageEvent
        return partial_event(**media, partial_image_index=payload.partial_image_index)
    completed_event = EditCompletedEvent if is_edit else CompletedEvent
    return completed_event(**media, quality=payload.quality, **payload.facts)

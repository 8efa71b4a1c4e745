"""A streaming call of a deployment, read as references and reliably ended when its reader leaves.

Serve cancels a call once. If a cancel meets the start of an asynchronous actor's task, after the task has left the
queue and before it is registered as running, it is reported as done and has no effect (Ray 2.60): the call would
run to its end without a reader. So this module repeats the cancel until the call is over.

`_to_object_ref_gen` is Serve's advanced API for passing on a stream's items; only this module uses it.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import ray
from ray.serve.context import _set_request_context

AGAIN_AFTER_S = 1.0
_ending: set["asyncio.Task[None]"] = set()
"""Strong references to tasks, because the event loop holds them weakly."""


def reference(value: Any) -> Any:
    """Returns a reference to a value that several deployment calls get, so that it is sent to each node only
    once."""
    return ray.put(value)


@asynccontextmanager
async def reference_stream(call: Callable[[], Any]) -> AsyncIterator[Any]:
    """Yields the ObjectRefGenerator of `call`, which calls a handle; cancels it when the block raises."""
    response = _call_apart(call)
    assigned = asyncio.ensure_future(response._to_object_ref_gen())
    try:
        yield await asyncio.shield(assigned)
    except BaseException:
        ending = asyncio.create_task(_end(response, assigned))
        _ending.add(ending)
        ending.add_done_callback(_ending.discard)
        raise


def _call_apart(call: Callable[[], Any]) -> Any:
    """Makes the call as a request of its own, with the same ID in logs.

    When Serve cancels a request, it also cancels the assignment of the calls that the request makes; for a replica
    that has just been called, there would be no reference left to cancel by.
    """
    context = contextvars.copy_context()
    context.run(_set_request_context, _internal_request_id=uuid4().hex)
    return context.run(call)


async def _end(response: Any, assigned: "asyncio.Future[Any]") -> None:
    await asyncio.wait((assigned,), timeout=AGAIN_AFTER_S)
    if not assigned.done():  # every replica is full: none has got the call
        response.cancel()
        return
    if assigned.cancelled() or assigned.exception() is not None:
        return
    references = assigned.result()
    over = asyncio.create_task(_wait_for(references.completed()))
    await asyncio.sleep(0)
    while not over.done():
        ray.cancel(references)
        await asyncio.wait((over,), timeout=AGAIN_AFTER_S)


async def _wait_for(completion: Any) -> None:
    with suppress(Exception):  # cancelled, failed or its replica lost: in any case over
        await completion

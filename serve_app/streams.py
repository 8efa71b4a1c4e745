"""A streaming call of a deployment, taken as references and ended for certain when its reader leaves.

Serve cancels a call once. A cancel that meets the start of an asynchronous actor's task, after it has left the
queue and before it is registered as running, is answered as done and has no effect (Ray 2.60): the call would run
to its end for nobody. Here it is repeated until the call is over.

`_to_object_ref_gen` is Serve's advanced API for handing a stream's items on; it is used here alone.
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
"""The event loop holds tasks weakly."""


def reference(value: Any) -> Any:
    """To what several calls of deployments are given alike: it crosses to each node once."""
    return ray.put(value)


@asynccontextmanager
async def reference_stream(call: Callable[[], Any]) -> AsyncIterator[Any]:
    """The ObjectRefGenerator of `call`, which calls a handle; it is cancelled when the block raises."""
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
    """As a request of its own, with the same id in logs.

    Serve, when it cancels a request, also cancels the assignment of those that it makes; of a replica that has
    just been asked there would be no reference left to cancel by.
    """
    context = contextvars.copy_context()
    context.run(_set_request_context, _internal_request_id=uuid4().hex)
    return context.run(call)


async def _end(response: Any, assigned: "asyncio.Future[Any]") -> None:
    await asyncio.wait((assigned,), timeout=AGAIN_AFTER_S)
    if not assigned.done():  # every replica is full: nobody has been asked
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
    with suppress(Exception):  # cancelled, failed, or its replica is lost: over
        await completion

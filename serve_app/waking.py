"""A model that sleeps is awake, all of its stages, before a request goes through them.

Models wake one at a time: two that each had a part of the room would wait for each other. And where one finds no
room, requests for others that may sleep wait until it has come; else who is asked without end would never leave.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.unplaced import LASTING_S, Unplaced
from serve_app.node_lock import NodeLock

log = logging.getLogger("ray.serve")


class Waking:
    """Of one model, whose stages may sleep."""

    def __init__(self, name: str, stages: Sequence[DeploymentHandle]) -> None:
        """
        Args:
            name: of the model.
            stages: those that may sleep.
        """
        cluster = str(ray.get_runtime_context().gcs_address).replace(":", "-")
        self._name, self._stages = name, stages
        self._alone = asyncio.Lock()
        """One request wakes the model, and the others wait for that."""
        self._turn, self._entry = NodeLock(f"{cluster}.waking"), NodeLock(f"{cluster}.entry")
        self._unplaced = Unplaced()

    async def wake(self) -> float:
        """Milliseconds until it was awake."""
        began = time.perf_counter()
        async with self._entry.held(shared=True):
            pass
        while not self._is_awake():
            async with self._alone:
                if not self._is_awake():
                    async with self._turn.held():
                        await self._come()
        return (time.perf_counter() - began) * 1e3

    def _is_awake(self) -> bool:
        return all(_has_replica(stage) for stage in self._stages)

    async def _come(self) -> None:
        """All stages at once, each woken by a call; nobody else may begin while there is no room."""
        log.info("model %r wakes", self._name)
        answers = asyncio.gather(*(stage.ping.remote() for stage in self._stages))
        try:
            async with AsyncExitStack() as stack:
                is_open = True
                while not answers.done():
                    await asyncio.wait([answers], timeout=LASTING_S)
                    lacking = await asyncio.to_thread(self._unplaced.lasting)
                    if lacking and is_open and not answers.done():
                        log.info("model %r finds no room: requests for others that may sleep wait", self._name)
                        await stack.enter_async_context(self._entry.held())
                        is_open = False
            await answers
        except (RayError, RayServeException) as error:
            log.warning("model %r does not wake: %s; it is asked again", self._name, error)
            await asyncio.sleep(LASTING_S)
        finally:
            answers.cancel()


def _has_replica(stage: Any) -> bool:
    """What the handle knows, told by Serve at once; to ask a replica would cost a call. Used here alone."""
    router = stage._router._asyncio_router
    chooses = router._request_router
    return bool(router._running_replicas if chooses is None else chooses.curr_replicas)

"""Wakes all stages of a sleeping model before a request passes through them.

Models wake one at a time: two that each had part of the resources would wait for each other. While a model finds
no room, requests for other models that may sleep wait until it has started; otherwise a model with constant
requests would never leave.
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

from cluster.scaling.free_resources import LASTING_S, Watch
from serve_app.flow.node_lock import NodeLock

log = logging.getLogger("ray.serve")


class WakeUp:
    """Wakes one model whose stages may sleep."""

    def __init__(self, name: str, stages: Sequence[DeploymentHandle]) -> None:
        """
        Args:
            name: of the model.
            stages: those that may sleep.
        """
        cluster = str(ray.get_runtime_context().gcs_address).replace(":", "-")
        self._name, self._stages = name, stages
        self._alone = asyncio.Lock()
        """Held by the request that wakes the model; other requests wait for it."""
        self._one_at_a_time, self._entry = NodeLock(f"{cluster}.wake_up"), NodeLock(f"{cluster}.entry")
        self._watch = Watch()

    async def wake(self) -> float:
        """Waits until the model is awake, and returns the milliseconds that took."""
        began = time.perf_counter()
        async with self._entry.held(shared=True):
            pass
        while not self._is_awake():
            async with self._alone:
                if not self._is_awake():
                    async with self._one_at_a_time.held():
                        await self._come()
        return (time.perf_counter() - began) * 1e3

    def _is_awake(self) -> bool:
        return all(_has_replica(stage) for stage in self._stages)

    async def _come(self) -> None:
        """Wakes all stages at once, each by a call; no other model's requests may enter while there is no room."""
        log.info("model %r wakes", self._name)
        answers = asyncio.gather(*(stage.ping.remote() for stage in self._stages))
        try:
            async with AsyncExitStack() as stack:
                is_open = True
                while not answers.done():
                    await asyncio.wait([answers], timeout=LASTING_S)
                    lacking = await asyncio.to_thread(self._watch.lacking)
                    if lacking and is_open and not answers.done():
                        log.info(
                            "model %r finds no room: requests for other models that may sleep wait until it does",
                            self._name,
                        )
                        await stack.enter_async_context(self._entry.held())
                        is_open = False
            await answers
        except (RayError, RayServeException) as error:
            log.warning("model %r does not wake: %s; trying again", self._name, error)
            await asyncio.sleep(LASTING_S)
        finally:
            answers.cancel()


def _has_replica(stage: Any) -> bool:
    """Whether the handle knows of a replica: Serve updates it at once, whereas asking a replica would cost a call.
    Only this module uses these attributes."""
    router = stage._router._asyncio_router
    chooses = router._request_router
    return bool(router._running_replicas if chooses is None else chooses.curr_replicas)

"""One count of what each key uses, for all ingresses of an app: a key has its limits once, whichever it meets."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from cluster.repeat import repeat
from cluster.replica_port import follow_ray_to_loopback
from cluster.serve_options import HEALTH_CHECKS
from cluster.termination import DrainOnSigterm
from serve_app.auth.config import AuthConfig
from serve_app.auth.keys import ApiKey, KeyLimits
from serve_app.auth.limits import LEASE_S, Ledger
from serve_app.auth.usage_file import UsageFile
from serve_app.errors import OverBudget, OverLimit

log = logging.getLogger("ray.serve")

SAVE_EVERY_S = 1.0
PATIENCE_S = 1.0
"""For the counter's answer, which takes two or three milliseconds."""
AWAY_S = 5.0
"""After it did not answer. Serve needs about as long to start another."""
MAX_ONGOING_REQUESTS = 10_000


class KeyCounter(DrainOnSigterm):
    """The deployment, of one replica."""

    def __init__(self, auth: AuthConfig) -> None:
        self.drain_on_sigterm()
        follow_ray_to_loopback()
        file = UsageFile(auth.usage_path(serve.get_replica_context().app_name))
        self._ledger = Ledger(file.read())
        repeat(lambda: file.write(self._ledger.spent), SAVE_EVERY_S, name="what keys have used")

    async def admit(self, name: str, limits: KeyLimits, lease_id: str) -> OverLimit | None:
        return self._ledger.admit(name, limits, lease_id, time.time())

    async def renew(self, leases: Iterable[tuple[str, str]]) -> None:
        self._ledger.renew(leases, time.time())

    async def release(self, name: str, lease_id: str) -> None:
        self._ledger.release(name, lease_id, time.time())

    async def charge(self, name: str, limits: KeyLimits, megapixel_steps: float) -> OverBudget | None:
        return self._ledger.charge(name, limits, megapixel_steps, time.time())


def build_counter(auth: AuthConfig, ray_actor_options: dict[str, Any]) -> Application:
    """ray_actor_options: those of the ingress, beside which it runs."""
    deployment = serve.deployment(KeyCounter).options(
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **HEALTH_CHECKS,
        ray_actor_options=ray_actor_options | {"num_cpus": 0},
    )
    return deployment.bind(auth)


class SharedLimits:
    """What an ingress asks of the counter. While that is away, it counts alone, and from nothing.

    So a lost counter stops nobody, and costs that for some seconds each ingress grants each key its limits anew.
    """

    def __init__(self, counter: Any) -> None:
        """counter: Serve's handle of a KeyCounter."""
        counter.options()  # connects it; the first call would stop the event loop while Serve is silent
        self._counter, self._alone = counter, Ledger()
        self._away_until = 0.0
        self._leases: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def admission(self, key: ApiKey) -> AsyncIterator["Admission"]:
        """Around one request. Raises OverLimit."""
        limits, lease = key.limits, (key.name, uuid4().hex)
        has_lease = limits.max_concurrent_requests is not None
        if has_lease or limits.requests_per_minute is not None:
            refusal = cast(OverLimit | None, await self._ask("admit", key.name, limits, lease[1]))
            if refusal is not None:
                raise refusal
        if has_lease:
            self._leases.add(lease)
            self._keep_leases()
        try:
            yield Admission(key, self)
        finally:
            if has_lease:
                self._leases.discard(lease)
                self._ask_later("release", *lease)

    async def charge(self, key: ApiKey, megapixel_steps: float) -> None:
        """Raises OverBudget."""
        if key.limits.budget_megapixel_steps is not None:
            refusal = await self._ask("charge", key.name, key.limits, megapixel_steps)
            if refusal is not None:
                raise cast(OverBudget, refusal)

    def give_back(self, key: ApiKey, megapixel_steps: float) -> None:
        if key.limits.budget_megapixel_steps is not None:
            self._ask_later("charge", key.name, key.limits, -megapixel_steps)

    async def _ask(self, method: str, *args: Any) -> object:
        if time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return cast(object, await getattr(self._counter, method).remote(*args))
            except (TimeoutError, RayError, RayServeException) as error:
                self._away_until = time.monotonic() + AWAY_S
                why = str(error).partition("\n")[0] or f"no answer in {PATIENCE_S:g} s"
                log.warning("the count of keys is away, so this ingress counts alone for %g s: %s", AWAY_S, why)
        return cast(object, getattr(self._alone, method)(*args, time.time()))

    def _ask_later(self, method: str, *args: Any) -> None:
        """Nobody waits for it."""
        task = asyncio.ensure_future(self._ask(method, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _keep_leases(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while self._leases:
            await asyncio.sleep(LEASE_S / 3)
            if self._leases:
                await self._ask("renew", list(self._leases))


class Admission:
    """One request of a key that was let in."""

    def __init__(self, key: ApiKey, limits: SharedLimits) -> None:
        self._key, self._limits = key, limits
        self.megapixel_steps = 0.0

    async def charge(self, megapixel_steps: float) -> None:
        """Raises OverBudget."""
        await self._limits.charge(self._key, megapixel_steps)
        self.megapixel_steps += megapixel_steps

    def give_back(self) -> None:
        """What it was charged: it failed."""
        if self.megapixel_steps:
            self._limits.give_back(self._key, self.megapixel_steps)
            self.megapixel_steps = 0.0

"""Counts what each key uses, for all ingresses of an app together, so that its limits hold across all of them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, cast
from uuid import uuid4

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from cluster.periodic import call_periodically
from cluster.replicas.replica_port import follow_ray_to_loopback
from cluster.replicas.serve_options import HEALTH_CHECKS
from cluster.termination import DrainOnSigterm
from deployments.request import GenerationRequest
from serve_app.auth.config import AuthConfig
from serve_app.auth.keys import ApiKey, KeyLimits
from serve_app.auth.limits import LEASE_S, Ledger
from serve_app.auth.usage_file import UsageFile
from serve_app.errors import OverBudget, OverLimit
from serve_app.inputs.cost import check_cost, total_cost

log = logging.getLogger("ray.serve")

SAVE_EVERY_S = 1.0
TIMEOUT_S = 1.0
"""Time limit for the counter's answer, which normally takes two or three milliseconds."""
AWAY_S = 5.0
"""How long an ingress counts alone after the counter did not answer; Serve takes about as long to replace it."""
MAX_ONGOING_REQUESTS = 10_000


class KeyCounter(DrainOnSigterm):
    """The counter's deployment; it has one replica."""

    def __init__(self, auth: AuthConfig) -> None:
        self.drain_on_sigterm()
        follow_ray_to_loopback()
        file = UsageFile(auth.usage_path(serve.get_replica_context().app_name))
        self._ledger = Ledger(file.read())
        call_periodically(lambda: file.write(self._ledger.spent), SAVE_EVERY_S, name="what keys have used")

    async def admit(self, name: str, limits: KeyLimits, request_id: str) -> OverLimit | None:
        return self._ledger.admit(name, limits, request_id, time.time())

    async def renew(self, leases: Iterable[tuple[str, str]]) -> None:
        self._ledger.renew(leases, time.time())

    async def release(self, name: str, request_id: str) -> None:
        self._ledger.release(name, request_id, time.time())

    async def charge(
        self, name: str, limits: KeyLimits, request_id: str, megapixel_steps: float
    ) -> OverBudget | float:
        return self._ledger.charge(name, limits, request_id, megapixel_steps, time.time())

    async def give_back(self, name: str, limits: KeyLimits, megapixel_steps: float, charged_at: float) -> None:
        self._ledger.give_back(name, limits, megapixel_steps, charged_at, time.time())


def build_counter(auth: AuthConfig, ray_actor_options: dict[str, Any]) -> Application:
    """Builds the counter's application. ray_actor_options: the ingress's, beside which the counter runs."""
    deployment = serve.deployment(KeyCounter).options(
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **HEALTH_CHECKS,
        ray_actor_options=ray_actor_options | {"num_cpus": 0},
    )
    return deployment.bind(auth)


class SharedLimits:
    """An ingress's client of the KeyCounter. While that does not answer, the ingress counts alone, from zero.

    So a lost counter blocks no request; the cost is that each ingress grants each key its limits anew for some
    seconds.
    """

    def __init__(self, counter: Any) -> None:
        """counter: Serve's handle of a KeyCounter."""
        counter.options()  # connects; otherwise the first call blocks the event loop if Serve is silent
        self._counter, self._alone = counter, Ledger()
        self._away_until = 0.0
        self._leases: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def admission(self, key: ApiKey, request_id: str | None = None) -> AsyncIterator["Admission"]:
        """Counts one request while it is in progress. Raises OverLimit.

        request_id: Serve's proxy sends the same ID when it repeats a request.
        """
        limits, lease = key.limits, (key.name, request_id or uuid4().hex)
        has_lease = limits.max_concurrent_requests is not None
        if has_lease or limits.requests_per_minute is not None:
            rejection = cast(OverLimit | None, await self._ask("admit", key.name, limits, lease[1]))
            if rejection is not None:
                raise rejection
        if has_lease:
            self._leases.add(lease)
            self._keep_leases()
        try:
            yield Admission(key, lease[1], self)
        finally:
            self._leases.discard(lease)
            if limits.has_any:
                self._ask_later("release", *lease)

    async def charge(self, key: ApiKey, request_id: str, megapixel_steps: float) -> float:
        """Returns the megapixel-steps charged by this call. Raises OverBudget."""
        if key.limits.budget_megapixel_steps is None:
            return megapixel_steps
        charged = await self._ask("charge", key.name, key.limits, request_id, megapixel_steps)
        if isinstance(charged, OverBudget):
            raise charged
        return cast(float, charged)

    async def give_back(self, key: ApiKey, megapixel_steps: float, charged_at: float) -> None:
        if key.limits.budget_megapixel_steps is not None:
            await self._ask("give_back", key.name, key.limits, megapixel_steps, charged_at)

    def give_back_later(self, key: ApiKey, megapixel_steps: float, charged_at: float) -> None:
        if key.limits.budget_megapixel_steps is not None:
            self._ask_later("give_back", key.name, key.limits, megapixel_steps, charged_at)

    async def _ask(self, method: str, *args: Any) -> object:
        if time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return cast(object, await getattr(self._counter, method).remote(*args))
            except (TimeoutError, RayError, RayServeException) as error:
                self._away_until = time.monotonic() + AWAY_S
                why = str(error).partition("\n")[0] or f"no answer in {TIMEOUT_S:g} s"
                log.warning(
                    "the KeyCounter does not answer, so this ingress counts alone for %g s: %s", AWAY_S, why
                )
        return cast(object, getattr(self._alone, method)(*args, time.time()))

    def _ask_later(self, method: str, *args: Any) -> None:
        """Calls the counter without waiting for the answer.

        When a client disconnects, Serve cancels all calls made in that request's context; this one has its own.
        """
        task = asyncio.get_running_loop().create_task(self._ask(method, *args), context=Context())
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
    """One admitted request of a key."""

    def __init__(self, key: ApiKey, request_id: str, limits: SharedLimits) -> None:
        self._key, self._request_id, self._limits = key, request_id, limits
        self._began_at = time.time()
        self.charged = 0.0
        """Megapixel-steps charged for this request, by this ingress or by one that died earlier."""
        self.megapixel_steps = 0.0
        """Megapixel-steps that this ingress has charged."""

    async def charge(self, requests: Sequence[GenerationRequest]) -> None:
        """Charges for the request's images, once. Raises OverBudget, or BadRequest if it alone costs too much."""
        check_cost(requests, self._key.limits.max_megapixel_steps, f"of the key {self._key.name!r}")
        megapixel_steps = total_cost(requests)
        self.megapixel_steps = await self._limits.charge(self._key, self._request_id, megapixel_steps)
        self.charged = megapixel_steps

    async def give_back(self) -> None:
        """Returns the charge to the key's budget, because the request produced nothing."""
        megapixel_steps, self.charged, self.megapixel_steps = self.charged, 0.0, 0.0
        if megapixel_steps:
            await self._limits.give_back(self._key, megapixel_steps, self._began_at)

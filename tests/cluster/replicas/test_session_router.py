"""Tests that calls of one session go to the same replica, and that every call is answered in any case."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.replicas.resources import ResourceConfig
from cluster.replicas.serve_options import plan_serve_options

pytestmark = pytest.mark.slow

PATIENCE_S = 30.0
MAX_ONGOING = 64
SESSIONS = [f"session {i}" for i in range(24)]


class Replica:
    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self, duration_s: float) -> int:
        await asyncio.sleep(duration_s)
        return os.getpid()


class Caller:
    """Makes calls as an ingress does: all at once, for one request."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def ask(self, sessions: list[str]) -> list[int]:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*(self._of(session).pid.remote() for session in sessions))

    async def fill(self, session: str) -> list[int]:
        """Returns the PIDs that take as many calls of a session as one replica may hold, then the PID that takes
        the next one."""
        async with asyncio.timeout(PATIENCE_S):
            calls = [self._of(session).sleep.remote(2.0) for _ in range(MAX_ONGOING)]
            await asyncio.sleep(0.5)
            last = await self._of(session).pid.remote()
            return [*await asyncio.gather(*calls), last]

    def _of(self, session: str) -> Any:
        return self._replicas.options(session_id=session)


@pytest.fixture(scope="module")
def caller(serve_url: str) -> Iterator[DeploymentHandle]:
    resources = ResourceConfig(num_cpus=0, min_replicas=2, max_replicas=2, max_ongoing_requests=MAX_ONGOING)
    options = plan_serve_options(resources, graceful_shutdown_timeout_s=1.0, has_sessions=True)
    caller = serve.deployment(Caller).options(ray_actor_options={"num_cpus": 0})
    replicas = serve.deployment(Replica).options(**options)
    yield serve.run(caller.bind(replicas.bind()), name="sessions", route_prefix=None)
    serve.delete("sessions")


def test_calls_of_a_session_meet_though_others_come_at_the_same_time(caller: DeploymentHandle) -> None:
    """The first test, because no queue lengths may be cached yet."""
    pids = [caller.ask.remote(SESSIONS * 2).result() for _ in range(3)]
    assert pids == [pids[0][: len(SESSIONS)] * 2] * 3
    assert len(set(pids[0])) == 2


def test_a_full_replica_is_passed_over(caller: DeploymentHandle) -> None:
    *full, next_one = caller.fill.remote(SESSIONS[0]).result()
    assert len({*full}) == 1
    assert next_one not in full


def test_more_calls_than_there_is_room_for_are_all_answered(caller: DeploymentHandle) -> None:
    assert len(caller.ask.remote(SESSIONS[:2] * (4 * MAX_ONGOING)).result()) == 8 * MAX_ONGOING


def test_a_dead_replica_is_passed_over(caller: DeploymentHandle) -> None:
    before = caller.ask.remote(SESSIONS).result()
    os.kill(before[0], signal.SIGKILL)
    assert before[0] not in caller.ask.remote(SESSIONS).result()

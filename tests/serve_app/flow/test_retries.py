"""Tests of which requests are repeated together when a stage is lost, and which fail.

The stage dies as soon as the request "killer" is in it.
"""

import asyncio
import os
from collections.abc import Sequence

import pytest
from ray.exceptions import ObjectLostError, RaySystemError, RayTaskError
from ray.serve.exceptions import RayServeException

from deployments.errors import ShardGroupLost
from serve_app.errors import StageFailed
from serve_app.flow import node_lock, retries
from serve_app.flow.isolation import PoisonIsolation
from serve_app.flow.retries import (
    MAX_ISOLATED_LOSSES,
    MAX_SHARED_LOSSES,
    StageLost,
    retry_when_lost,
    translating_errors,
)

NUM_INNOCENT = 7
TAKES_S = 0.02


class Stage:
    """A stage that dies with all requests in it, and whose successor then serves.

    num_accidents: how many times it dies without a killer, once all innocent requests are in it.
    """

    def __init__(self, *, num_accidents: int = 0) -> None:
        self.num_lost, self.most_at_once = 0, 0
        self._num_accidents = num_accidents
        self._death, self._num_in = asyncio.Event(), 0

    async def serve(self, name: str) -> str:
        death, self._num_in = self._death, self._num_in + 1
        self.most_at_once = max(self.most_at_once, self._num_in)
        try:
            if name == "killer":
                self.die()
            elif self._num_accidents and self._num_in == NUM_INNOCENT:
                self._num_accidents -= 1
                self.die()
            async with asyncio.timeout(TAKES_S):
                await death.wait()
        except TimeoutError:
            return name
        finally:
            self._num_in -= 1
        raise StageLost("denoise", ConnectionError("it died"), was_served=True)

    def die(self) -> None:
        self.num_lost += 1
        self._death.set()
        self._death = asyncio.Event()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(retries, "MAX_BACKOFF_S", 0.001)
    monkeypatch.setattr(node_lock, "PERIOD_S", 0.001)


INNOCENTS = [f"innocent {i}" for i in range(NUM_INNOCENT)]


def served(names: Sequence[str], *, num_accidents: int = 0) -> tuple[list[str | BaseException], Stage]:
    """Sends the requests through two ingress replicas, alternately. Returns the answers and the stage."""

    async def serve_all() -> tuple[list[str | BaseException], Stage]:
        stage = Stage(num_accidents=num_accidents)
        ingresses = [PoisonIsolation(f"test_retries-{os.getpid()}") for _ in range(2)]

        async def one(i: int, name: str) -> str:
            return await retry_when_lost(lambda: stage.serve(name), ingresses[i % 2])

        asking = [one(i, name) for i, name in enumerate(names)]
        return await asyncio.gather(*asking, return_exceptions=True), stage

    return asyncio.run(serve_all())


def test_whoever_was_lost_with_a_poison_request_is_answered() -> None:
    answers, _ = served([*INNOCENTS, "killer"])
    assert answers[:-1] == INNOCENTS


def test_a_poison_request_is_given_up_after_few_losses() -> None:
    answers, stage = served([*INNOCENTS, "killer"])
    assert isinstance(answers[-1], StageFailed)
    assert stage.num_lost == MAX_SHARED_LOSSES + MAX_ISOLATED_LOSSES == 4


def test_two_poison_requests_beside_each_other_take_nobody_with_them() -> None:
    answers, _ = served(["killer", *INNOCENTS, "killer"])
    assert answers[1:-1] == INNOCENTS


def test_after_an_accident_all_are_retried_together() -> None:
    answers, stage = served(INNOCENTS, num_accidents=1)
    assert answers == INNOCENTS
    assert stage.num_lost == 1
    assert stage.most_at_once == NUM_INNOCENT


def test_requests_of_two_ingress_replicas_are_isolated_one_by_one() -> None:
    async def most_at_once() -> int:
        now, most = 0, 0

        async def isolated() -> None:
            nonlocal now, most
            async with PoisonIsolation(f"test_retries-{os.getpid()}").held():
                now, most = now + 1, max(most, now + 1)
                await asyncio.sleep(0.01)
                now -= 1

        await asyncio.gather(*(isolated() for _ in range(4)))
        return most

    assert asyncio.run(most_at_once()) == 1


def test_one_that_gives_up_waiting_leaves_the_isolation_to_the_others() -> None:
    async def gives_up() -> None:
        one, other = (PoisonIsolation(f"test_retries-{os.getpid()}") for _ in range(2))
        async with one.held():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), other.held():
                    pass
        async with asyncio.timeout(1), other.held():
            pass

    asyncio.run(gives_up())


@pytest.mark.parametrize(
    ("error", "is_input_lost"),
    [
        (ObjectLostError("0" * 56, None, ""), True),
        (RayServeException("the upstream actor died"), True),
        (RaySystemError("the worker is gone"), False),
        (RayTaskError("denoise", "Traceback", ShardGroupLost("a rank is gone")).as_instanceof_cause(), False),
    ],
)
def test_the_input_is_made_again_only_if_it_is_what_was_lost(error: Exception, is_input_lost: bool) -> None:
    lost: list[bool] = []
    with (
        pytest.raises(StageLost),
        translating_errors("denoise", param="size", if_input_lost=lambda: lost.append(True)),
    ):
        raise error
    assert lost == [True] * is_input_lost
    with pytest.raises(StageLost), translating_errors("denoise", param="size"):
        raise error


def test_a_loss_says_its_cause_in_one_line() -> None:
    with pytest.raises(StageLost) as caught, translating_errors("denoise", param="size"):
        raise RaySystemError("the worker is gone\nTraceback: …")
    told = str(caught.value)
    assert told.startswith("the denoise stage was lost (RaySystemError: ")
    assert "Traceback" not in told
    assert told.endswith("the worker is gone)")

"""Who is repeated with whom when a stage is lost, and who is given up.

The stage dies as soon as a killer is in it.
"""

import asyncio
import os
from collections.abc import Sequence

import pytest

from serve_app import losses, node_lock
from serve_app.errors import StageFailed
from serve_app.losses import LOSSES_ALONE, LOSSES_TOGETHER, StageLost, repeat_when_lost
from serve_app.suspects import Suspects

NUM_INNOCENT = 7
TAKES_S = 0.02


class Stage:
    """Serves until it is killed; then all are lost that were in it, and its successor serves."""

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
    monkeypatch.setattr(losses, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(losses, "MAX_BACKOFF_S", 0.001)
    monkeypatch.setattr(node_lock, "PERIOD_S", 0.001)


INNOCENTS = [f"innocent {i}" for i in range(NUM_INNOCENT)]


def served(names: Sequence[str], *, num_accidents: int = 0) -> tuple[list[str | BaseException], Stage]:
    """By two ingress replicas, in turns."""

    async def serve_all() -> tuple[list[str | BaseException], Stage]:
        stage = Stage(num_accidents=num_accidents)
        ingresses = [Suspects(f"test_losses-{os.getpid()}") for _ in range(2)]

        async def one(i: int, name: str) -> str:
            return await repeat_when_lost(lambda: stage.serve(name), ingresses[i % 2])

        asking = [one(i, name) for i, name in enumerate(names)]
        return await asyncio.gather(*asking, return_exceptions=True), stage

    return asyncio.run(serve_all())


def test_whoever_was_lost_with_a_killer_is_answered() -> None:
    answers, _ = served([*INNOCENTS, "killer"])
    assert answers[:-1] == INNOCENTS


def test_a_killer_is_given_up_after_few_losses() -> None:
    answers, stage = served([*INNOCENTS, "killer"])
    assert isinstance(answers[-1], StageFailed)
    assert stage.num_lost == LOSSES_TOGETHER + LOSSES_ALONE == 4


def test_two_killers_beside_each_other_take_nobody_with_them() -> None:
    answers, _ = served(["killer", *INNOCENTS, "killer"])
    assert answers[1:-1] == INNOCENTS


def test_after_an_accident_all_are_repeated_together() -> None:
    answers, stage = served(INNOCENTS, num_accidents=1)
    assert answers == INNOCENTS
    assert stage.num_lost == 1
    assert stage.most_at_once == NUM_INNOCENT


def test_suspects_of_two_ingress_replicas_take_turns() -> None:
    async def most_at_once() -> int:
        now, most = 0, 0

        async def suspect() -> None:
            nonlocal now, most
            async with Suspects(f"test_losses-{os.getpid()}").alone():
                now, most = now + 1, max(most, now + 1)
                await asyncio.sleep(0.01)
                now -= 1

        await asyncio.gather(*(suspect() for _ in range(4)))
        return most

    assert asyncio.run(most_at_once()) == 1


def test_a_suspect_that_gives_up_waiting_leaves_the_turn_to_the_others() -> None:
    async def gives_up() -> None:
        one, other = (Suspects(f"test_losses-{os.getpid()}") for _ in range(2))
        async with one.alone():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), other.alone():
                    pass
        async with asyncio.timeout(1), other.alone():
            pass

    asyncio.run(gives_up())

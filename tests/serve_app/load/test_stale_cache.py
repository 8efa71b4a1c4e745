"""Tests of StaleWhileRevalidate: any number of callers cause at most one look-up per second."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.load import stale_cache
from serve_app.load.stale_cache import CachedValue, StaleWhileRevalidate


class Costly:
    """A slow look-up that counts its calls."""

    def __init__(self, takes_s: float = 0.02) -> None:
        self.takes_s = takes_s
        self.num_looks = self.num_at_once = self.most_at_once = 0

    async def look(self) -> int:
        self.num_looks += 1
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        look = self.num_looks
        await asyncio.sleep(self.takes_s)
        self.num_at_once -= 1
        return look


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(test())  # type: ignore[arg-type]


def test_forty_who_ask_at_once_cost_one_look() -> None:
    async def ask() -> tuple[int, set[int]]:
        costly = Costly()
        seen = StaleWhileRevalidate(costly.look)
        answers = await asyncio.gather(*(seen.get() for _ in range(40)))
        return costly.num_looks, {cached.value for cached in answers if cached is not None}

    assert run(ask) == (1, {1})


def test_forty_who_ask_all_the_time_cost_one_look_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_cache, "FRESH_S", 0.2)

    async def ask() -> tuple[int, int]:
        costly = Costly()
        seen = StaleWhileRevalidate(costly.look)
        ages = []
        for _ in range(50):
            replies = await asyncio.gather(*(seen.get() for _ in range(40)))
            ages += [cached.age_s for cached in replies if cached is not None]
            await asyncio.sleep(0.01)
        assert max(ages) < 0.2 + costly.takes_s + 1.0
        return costly.num_looks, costly.most_at_once

    num_looks, most_at_once = run(ask)
    assert 2 <= num_looks < 20
    assert most_at_once == 1


def test_while_a_look_takes_long_the_last_is_given_with_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_cache, "FRESH_S", 0.0)
    monkeypatch.setattr(stale_cache, "TIMEOUT_S", 0.05)

    async def ask() -> tuple[list[CachedValue[int] | None], int]:
        costly = Costly()
        seen = StaleWhileRevalidate(costly.look)
        answers = [await seen.get()]
        costly.takes_s = 60.0
        answers += [await seen.get() for _ in range(3)]
        return answers, costly.num_looks

    answers, num_looks = run(ask)
    assert [cached.value for cached in answers if cached] == [1, 1, 1, 1]
    assert answers[3].age_s > answers[1].age_s >= 0.05
    assert num_looks == 2


def test_before_anything_was_seen_there_is_nothing_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_cache, "FIRST_TIMEOUT_S", 0.05)

    async def ask() -> CachedValue[int] | None:
        return await StaleWhileRevalidate(Costly(60.0).look).get()

    assert run(ask) is None


def test_one_who_leaves_does_not_end_the_look_of_the_others() -> None:
    async def ask() -> CachedValue[int] | None:
        seen = StaleWhileRevalidate(Costly().look)
        leaves, stays = asyncio.create_task(seen.get()), asyncio.create_task(seen.get())
        await asyncio.sleep(0.01)
        leaves.cancel()
        return await stays

    assert run(ask).value == 1


def test_a_look_that_fails_leaves_what_was_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale_cache, "FRESH_S", 0.0)
    looks = iter([1])

    async def look() -> int:
        return next(looks, None) or int("nothing")

    async def ask() -> list[int | None]:
        seen = StaleWhileRevalidate(look)
        return [cached and cached.value for cached in [await seen.get(), await seen.get()]]

    assert run(ask) == [1, 1]

"""A memo of the values that the prompts of one batch share, in front of the cache."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.stages.result_cache import ResultCache


class BatchMemo:
    """Values that the prompts of one batch share. Each is made once, whether or not the cache keeps it.

    For calls that run in lockstep (texts/lockstep.py), so one at a time.
    """

    def __init__(self, cache: ResultCache) -> None:
        self._cache = cache
        self._made: dict[Hashable, Any] = {}
        self._under_way: set[Hashable] = set()

    def get(self, key: Hashable, wait: Callable[[], object]) -> Any:
        """Returns the value from this batch or the cache, or None. wait: called while another prompt makes it."""
        while key in self._under_way:
            wait()
        return self._made[key] if key in self._made else self._cache.get(key)

    @contextmanager
    def making(self, key: Hashable) -> Iterator[None]:
        """Marks the value as being made. If making it fails, a waiting prompt makes it itself."""
        self._under_way.add(key)
        try:
            yield
        finally:
            self._under_way.discard(key)

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        self._made[key] = value
        self._cache.put(key, value, num_bytes)

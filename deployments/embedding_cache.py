"""What encoders made of texts and pictures seen lately."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any


class EmbeddingCache:
    """Least recently used first out, bounded by the tensors' bytes. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """What was put there, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keep it, at the expense of the oldest. What is larger than the whole cache is not kept."""
        with self._lock:
            if key in self._entries or num_bytes > self._max_bytes:
                return
            self._entries[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                _, (_, oldest_bytes) = self._entries.popitem(last=False)
                self.num_bytes -= oldest_bytes


class Together:
    """What the prompts of one batch make: each value once, kept by the cache or not. For calls in step."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self._cache = cache
        self._made: dict[Hashable, Any] = {}
        self._under_way: set[Hashable] = set()

    def get(self, key: Hashable, wait: Callable[[], object]) -> Any:
        """What the cache has, or another prompt of the batch has made, or None. wait: while it is under way."""
        while key in self._under_way:
            wait()
        return self._made[key] if key in self._made else self._cache.get(key)

    @contextmanager
    def making(self, key: Hashable) -> Iterator[None]:
        """If it fails, whoever waits for it makes it himself."""
        self._under_way.add(key)
        try:
            yield
        finally:
            self._under_way.discard(key)

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        self._made[key] = value
        self._cache.put(key, value, num_bytes)

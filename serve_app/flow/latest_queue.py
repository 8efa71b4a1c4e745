"""A queue of undelivered events in which some events replace earlier ones. For one event loop."""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class LatestQueue(Generic[Item]):
    """Returns items in the order they were put; an item with a key replaces a waiting item with the same key.

    So while its reader is slow or absent, the queue grows only by items without a key.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Item] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: Item, key: Hashable | None = None) -> None:
        key = object() if key is None else key
        self._waiting.pop(key, None)
        self._waiting[key] = item
        self._changed.set()

    async def get(self) -> Item:
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.pop(next(iter(self._waiting)))

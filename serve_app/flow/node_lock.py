"""A lock across all ingress replicas of a node, which do not know of each other."""

import asyncio
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PERIOD_S = 0.1
"""How often a waiting process checks whether the lock is free."""


class NodeLock:
    """A locked file. The lock of a dead process is released. Waiting processes acquire it in no particular
    order."""

    def __init__(self, name: str) -> None:
        """name: the same for all processes that exclude each other."""
        folder = Path(tempfile.gettempdir()) / f"latent-relay-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / name.replace(os.sep, "-")

    @asynccontextmanager
    async def held(self, *, shared: bool = False) -> AsyncIterator[None]:
        """Context that holds the lock exclusively; shared: together with other shared holders."""
        with self._path.open("a") as file:  # the lock belongs to this file descriptor
            while not _has_locked(file.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                await asyncio.sleep(PERIOD_S)
            yield


def _has_locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

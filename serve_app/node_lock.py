"""A lock over all ingress replicas of a node, which know nothing of each other."""

import asyncio
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PERIOD_S = 0.1
"""How often it is looked whether it is free."""


class NodeLock:
    """A locked file: what a dead process has locked is free again. Who waits takes turns in no order."""

    def __init__(self, name: str) -> None:
        """name: the same for all who lock each other out."""
        folder = Path(tempfile.gettempdir()) / f"latent-relay-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / name.replace(os.sep, "-")

    @asynccontextmanager
    async def held(self, *, shared: bool = False) -> AsyncIterator[None]:
        """By this alone; shared: beside others that share it."""
        with self._path.open("a") as file:  # whoever has it open locks it for himself
            while not _has_locked(file.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                await asyncio.sleep(PERIOD_S)
            yield


def _has_locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

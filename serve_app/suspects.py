"""Who may be what kills a stage is served alone: then it is known, and nobody is lost with it."""

import asyncio
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PERIOD_S = 0.1
"""How often a suspect looks whether it is its turn."""


class Suspects:
    """Requests that were there each time when a stage was lost: one at a time over all ingress replicas of a node.

    A locked file, for the ingress replicas know nothing of each other; what a dead one has locked is free again.
    """

    def __init__(self, name: str) -> None:
        """name: of what is served; the same for all ingress replicas of it."""
        folder = Path(tempfile.gettempdir()) / f"latent-relay-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / f"{name.replace(os.sep, '-')}.suspect"

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While no other suspect is. They take turns in no order."""
        with self._path.open("w") as file:  # whoever has it open locks it for himself
            while not _has_locked(file.fileno()):
                await asyncio.sleep(PERIOD_S)
            yield


def _has_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

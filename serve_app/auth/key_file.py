"""Reloads the key file when it changes: a revoked key is rejected a second later."""

import logging
from pathlib import Path

from cluster.periodic import call_periodically
from serve_app.auth.keys import KeyFault, KeyRing, read_keys

log = logging.getLogger("ray.serve")

LOOK_EVERY_S = 0.5


class KeyFile:
    """The keys in a file, kept up to date."""

    def __init__(self, path: Path) -> None:
        """Raises KeyFault or FileNotFoundError."""
        self._path = path
        self._seen = self._read = self._look()
        self.keys = KeyRing(read_keys(path))

    def follow(self) -> None:
        """Starts a thread that calls `refresh` every LOOK_EVERY_S seconds."""
        call_periodically(self.refresh, LOOK_EVERY_S, name="keys")

    def refresh(self) -> None:
        """Reads the file if it has changed and is no longer being written, that is, unchanged since the last look.

        If the file is missing, no key is valid; if it is invalid, the keys stay as they were.
        """
        before, self._seen = self._seen, self._look()
        if self._seen != before or self._seen == self._read:
            return
        self._read = self._seen
        try:
            keys = read_keys(self._path)
        except FileNotFoundError as error:
            log.error("no key is valid any more: %s", error)
            self.keys = KeyRing()
        except KeyFault as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.warning("%d keys were read from %s", len(keys), self._path)
            self.keys = KeyRing(keys)

    def _look(self) -> tuple[int, ...]:
        """Returns mtime, size and inode of the file (of a link's target), which differ once it changes; or ()."""
        try:
            told = self._path.stat()
        except OSError:
            return ()
        return told.st_mtime_ns, told.st_size, told.st_ino

"""The file of keys, followed while it is served: a key that is revoked opens nothing a second later."""

import logging
from pathlib import Path

from cluster.repeat import repeat
from serve_app.auth.keys import KeyFault, KeyRing, read_keys

log = logging.getLogger("ray.serve")

LOOK_EVERY_S = 1.0


class KeyFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path) -> None:
        """Raises KeyFault, or FileNotFoundError."""
        self._path = path
        self._seen = self._look()
        self.keys = KeyRing(read_keys(path))

    def follow(self) -> None:
        """From now on, in a thread of its own."""
        repeat(self.refresh, LOOK_EVERY_S, name="keys")

    def refresh(self) -> None:
        """Reads the file if it is another. Without one no key opens; of one that makes no sense, perhaps because
        it is being written, nothing is taken over."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            keys = read_keys(self._path)
        except FileNotFoundError as error:
            log.error("no key opens any more: %s", error)
            self.keys = KeyRing()
        except KeyFault as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.warning("%d keys were read from %s", len(keys), self._path)
            self.keys = KeyRing(keys)

    def _look(self) -> tuple[int, ...]:
        """What differs as soon as the file, or what a link to it points to, is another."""
        try:
            told = self._path.stat()
        except OSError:
            return ()
        return told.st_mtime_ns, told.st_size, told.st_ino

"""Stores what the keys have used of their budgets, for the next start."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from serve_app.auth.limits import Spent

log = logging.getLogger("ray.serve")


class UsageFile:
    """The usage file. It is written atomically: a reader sees the old content or the new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, Spent] = {}
        self._has_failed = False

    def read(self) -> dict[str, Spent]:
        """Returns what was spent, by key name; nothing if the file is missing or invalid."""
        try:
            content = json.loads(self._path.read_text())
            self._written = {name: Spent(**of) for name, of in content.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("all budgets start unused, because %s cannot be read: %s", self._path, error)
        return dict(self._written)

    def write(self, spent: Mapping[str, Spent]) -> None:
        """Writes `spent` if it has changed. If that fails, logs so once; the caller keeps the data in memory."""
        now = dict(spent)
        if now == self._written:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_text(json.dumps({name: asdict(of) for name, of in now.items()}, indent=1))
            part.replace(self._path)
            self._written, self._has_failed = now, False
        except OSError as error:
            if not self._has_failed:
                log.error(
                    "a restart will forget what the keys have used, because it cannot be stored: set "
                    "auth.usage_file to another path: %s",
                    error,
                )
            self._has_failed = True

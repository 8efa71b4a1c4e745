"""What the keys have used of their budgets, kept for the next start."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from serve_app.auth.limits import Spent

log = logging.getLogger("ray.serve")


class UsageFile:
    """Written at once: whoever reads meanwhile sees what was or what is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, Spent] = {}
        self._has_failed = False

    def read(self) -> dict[str, Spent]:
        """By the keys' names. Without a file, or with one that makes no sense, nothing has been used."""
        try:
            content = json.loads(self._path.read_text())
            self._written = {name: Spent(**of) for name, of in content.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("all budgets are counted from nothing: %s cannot be read: %s", self._path, error)
        return dict(self._written)

    def write(self, spent: Mapping[str, Spent]) -> None:
        """If it is another than is written. Where it cannot be written it is told once, and kept in memory."""
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
                log.error("a restart will forget what keys have used: set auth.usage_file: %s", error)
            self._has_failed = True

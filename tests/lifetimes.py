"""Ends apps after the last test that uses them: each idle process of Serve takes 2 to 4 % of a core."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
from ray import serve

from tests.app import App


class Lifetimes:
    """The apps of one process. An app lives as long as its owner: a session fixture, by its name, or else the file
    whose test first started it."""

    def __init__(self) -> None:
        self._last: dict[str | Path, pytest.Item] = {}
        self._apps: dict[str | Path, list[App]] = defaultdict(list)
        self._by_key: dict[Hashable, App] = {}
        self._now: pytest.Item | None = None

    def note(self, items: Sequence[pytest.Item]) -> None:
        """Records all tests, in their order."""
        for item in items:
            self._last |= dict.fromkeys((item.path, *fixtures_of(item)), item)

    def begin(self, item: pytest.Item) -> None:
        self._now = item

    def known(self, key: Hashable) -> App | None:
        """Returns the running app that was started with this key."""
        return self._by_key.get(key)

    def add(self, app: App, owner: str | None, key: Hashable = None) -> App:
        assert self._now is not None
        self._apps[owner or self._now.path].append(app)
        if key is not None:
            self._by_key[key] = app
        return app

    def end(self, item: pytest.Item) -> None:
        """Ends all apps that no test after this one needs."""
        over = [owner for owner in self._apps if self._last[owner] is item]
        for app in [app for owner in over for app in self._apps.pop(owner)]:
            app.client.close()
            self._by_key = {key: known for key, known in self._by_key.items() if known is not app}
            if app.name in serve.status().applications:
                serve.delete(app.name, _blocking=False)


def fixtures_of(item: pytest.Item) -> set[str]:
    """Returns the test's fixtures, and its string parameters, which may be names of fixtures."""
    params: dict[str, object] = item.callspec.params if hasattr(item, "callspec") else {}
    return {*getattr(item, "fixturenames", ()), *(value for value in params.values() if isinstance(value, str))}

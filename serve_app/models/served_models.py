"""The served models behind one ingress, by the names that clients put into `model`."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from serve_app.load.stale_cache import CachedValue
from serve_app.models.card import ModelLimits
from serve_app.models.names import find_name
from serve_app.models.replicas import SERVING
from serve_app.relay import Relay


class Models:
    """One Relay per served model, in the order of the config."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = {relay.name: relay for relay in relays}

    def __iter__(self) -> Iterator[Relay]:
        return iter(self._relays.values())

    @property
    def is_one(self) -> bool:
        """Whether there is only one model; answers about a single model are not nested under its name."""
        return len(self._relays) == 1

    def find(self, name: str | None, path: str | None = None) -> Relay:
        """Returns the model that a request means. Raises UnknownModel.

        name: as in the request; None: the first model of the config that is served at this path, or else the first
        of all.
        """
        if name is None:
            return next((relay for relay in self if path in relay.paths), next(iter(self)))
        return self._relays[find_name(name, self._relays)]

    @property
    def names(self) -> list[str]:
        return list(self._relays)

    @property
    def limits(self) -> list[ModelLimits]:
        """The limits of each model."""
        return [relay.model().limits for relay in self]

    def is_asked_at(self, path: str) -> bool:
        """Whether some model is served at this path."""
        return any(path in relay.paths for relay in self)

    async def health(self) -> CachedValue[dict[str, Any]]:
        """Returns whether each model's stages can serve, as last seen; for several models, by name under
        `models`."""
        seen = await asyncio.gather(*(relay.health() for relay in self))
        told = {relay.name: _health(cached.value) for relay, cached in zip(self, seen, strict=True)}
        age_s = max(cached.age_s for cached in seen)
        if self.is_one:
            return CachedValue(next(iter(told.values())), age_s)
        return CachedValue({"ok": all(of["ok"] for of in told.values()), "models": told}, age_s)

    async def status(self) -> dict[str, Any]:
        """Returns the status of each model's Relay; for several models, by name under `models`."""
        told = await asyncio.gather(*(relay.status() for relay in self))
        if self.is_one:
            return told[0]
        return {
            "num_in_progress": sum(of["num_in_progress"] for of in told),
            "age_s": max(of["age_s"] for of in told),
            "models": {of["model"]: of for of in told},
        }


def _health(stages: dict[str, str]) -> dict[str, Any]:
    return {"ok": all(state in SERVING for state in stages.values()), "stages": stages}

"""The load of the other ingresses of this application, read once a second while this ingress is busy."""

import asyncio
from collections.abc import Mapping

from cluster.replicas.sibling_replicas import SiblingReplicas
from serve_app.load.backlog import NO_LOAD, Load
from serve_app.load.stale_cache import StaleWhileRevalidate

TIMEOUT_S = 1.0


class PeerLoads:
    """The loads that one ingress reads from its peers by `Ingress.loads`."""

    def __init__(self, own_id: str) -> None:
        self._own_id, self._siblings = own_id, SiblingReplicas("loads", timeout_s=TIMEOUT_S)
        self._seen = StaleWhileRevalidate(self._ask)

    def of(self, model: str) -> Load:
        """Returns the last reported load without waiting: at most a second old if the peers answer."""
        loads: Load | None = (self._seen.get_now() or {}).get(model)
        return loads or NO_LOAD

    async def _ask(self) -> Mapping[str, Load]:
        """Returns the peers' total load by model."""
        answers = await asyncio.to_thread(self._siblings.ask_each)
        total: dict[str, Load] = {}
        for name, loads in answers:
            for model, load in loads.items() if name != self._own_id else ():
                total[model] = total.get(model, NO_LOAD) + load
        return total

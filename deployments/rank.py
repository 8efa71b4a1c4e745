"""Ranks 1 to S - 1 of a shard group: a child actor of the Transformer's replica for each."""

import asyncio
from functools import partial
from typing import Any

from cluster.meeting import MeetingPoint
from cluster.place import Place, Rendezvous
from cluster.serve_options import HEALTH_CHECKS
from cluster.shard_group import this_place
from cluster.termination import on_sigterm
from deployments.config import ModelConfig, TransformerConfig
from deployments.replica import exit_replica
from deployments.stages import load_stage
from deployments.stats import RankStats


class Rank:
    """Holds consecutive blocks of each denoiser, or a part of them. Dies with its group: a ring with a gap serves
    nobody."""

    def __init__(
        self, rank: int, model: ModelConfig, config: TransformerConfig, meeting: MeetingPoint | None = None
    ) -> None:
        """meeting: where ranks that share each forward meet."""
        on_sigterm(partial(exit_replica, SystemExit("SIGTERM")))
        self._stage = load_stage("follow", model, config, rank, meeting)

    async def place(self) -> Place:
        return this_place()

    async def stats(self) -> RankStats:
        return self._stage.stats()

    async def load_adapter(self, slot: int, weights: Any) -> int:
        """Bytes of what is kept of it here."""
        return await asyncio.to_thread(self._stage.load_adapter, slot, weights)

    async def unload_adapter(self, slot: int) -> None:
        """No request that names it is left."""
        self._stage.unload_adapter(slot)

    async def connect(self, rendezvous: Rendezvous) -> None:
        """Meet the other ranks; returns when all have met."""
        await asyncio.to_thread(self._stage.connect, rendezvous, exit_replica)

    async def alive(self) -> None:
        """Never answers: the caller learns of this process's death. A GPU that is lost is one, at work or idle."""
        while not self._stage.keeper.is_device_lost():
            await asyncio.sleep(HEALTH_CHECKS["health_check_period_s"])
        exit_replica(RuntimeError("its GPU is lost"))

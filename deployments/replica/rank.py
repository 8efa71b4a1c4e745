"""Ranks 1 to S - 1 of a shard group; each is a child actor of the Transformer's replica."""

import asyncio
from functools import partial
from typing import Any

from cluster.ranks.place import Place, Rendezvous
from cluster.ranks.shard_group import this_place
from cluster.ranks.store_address import StoreAddress
from cluster.replicas.serve_options import HEALTH_CHECKS
from cluster.termination import on_sigterm
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.replica.lifecycle import exit_replica
from deployments.stages import load_stage
from deployments.stages.stats import RankStats


class Rank:
    """Holds consecutive blocks of each denoiser, or a part of these. Ends with its group, because a ring cannot
    serve with a rank missing."""

    def __init__(
        self, rank: int, model: ModelConfig, config: TransformerConfig, store: StoreAddress | None = None
    ) -> None:
        """store: where the ranks that share each forward meet."""
        on_sigterm(partial(exit_replica, SystemExit("SIGTERM")))
        self._stage = load_stage("worker", model, config, rank, store)

    async def place(self) -> Place:
        return this_place()

    async def stats(self) -> RankStats:
        return self._stage.stats()

    async def load_adapter(self, slot: int, weights: Any) -> int:
        """Loads an adapter; returns the bytes of it that this rank keeps."""
        return await asyncio.to_thread(self._stage.load_adapter, slot, weights)

    async def unload_adapter(self, slot: int) -> None:
        """Unloads an adapter. To be called when no request that names it is left."""
        self._stage.unload_adapter(slot)

    async def connect(self, rendezvous: Rendezvous) -> None:
        """Connects to the other ranks; returns when all have connected."""
        await asyncio.to_thread(self._stage.connect, rendezvous, exit_replica)

    async def alive(self) -> None:
        """Never returns, so the call fails when this process ends. Ends the process if its GPU is lost."""
        while not self._stage.residency.is_device_lost():
            await asyncio.sleep(HEALTH_CHECKS["health_check_period_s"])
        exit_replica(RuntimeError("its GPU is lost"))

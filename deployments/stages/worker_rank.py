"""A worker rank, which is any rank but rank 0 of a shard group: its blocks, and its place in the ring."""

import os
from collections.abc import Callable
from typing import Any

import torch

from cluster.ranks.open_transport import open_transport
from cluster.ranks.place import Rendezvous
from cluster.ranks.ring import Ring, RingStats, no_peers
from cluster.ranks.store_address import StoreAddress
from cluster.ranks.transport import join_store
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import AdapterWeights
from deployments.engine.blocks import cuttable_names, shape_only_inputs
from deployments.engine.constant_cache import ConstantCache
from deployments.engine.load import Denoisers, LoadedRank, load_rank, open_denoisers, open_parallel
from deployments.engine.merge import build_mergers
from deployments.engine.micro_batch import MicroBatchWorker
from deployments.memory.residency import WeightResidency
from deployments.stages.stats import RankStats


class WorkerRank:
    """Rank `rank` of a shard group."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, rank: int, store: StoreAddress | None = None
    ) -> None:
        """store: where the ranks that share this rank's forwards meet, if there are any."""
        torch.set_num_threads(config.num_threads)
        self._rank, self._config = rank, config
        self._denoisers = open_denoisers(model, config)
        self._store = None
        if store is not None:
            self._store = join_store(store.host, store.port, config.num_ranks)
        self._group, parallel = open_parallel(self._denoisers, config, rank, self._store)
        self.loaded = load_rank(self._denoisers, model, config, rank, parallel)

    @property
    def residency(self) -> WeightResidency:
        return self.loaded.residency

    def connect(self, rendezvous: Rendezvous, on_lost: Callable[[BaseException], None]) -> None:
        """Connects to the other ranks and starts to work. on_lost: called when the group is lost."""
        device, skeletons, degree = self._denoisers.device, self._denoisers.skeletons, self._config.parallel_degree
        is_first = self._rank < degree
        worker = MicroBatchWorker(
            self.loaded,
            build_mergers(skeletons),
            ConstantCache(device),
            self.residency.release,
            shape_only={name: shape_only_inputs(of) for name, of in skeletons.items()} if is_first else {},
            is_heard=self._rank % degree == 0,
        )
        self._ring = Ring(
            worker.run,
            rank=self._rank,
            transport=open_transport(self._rank, rendezvous, device=device, store=self._store),
            on_failure=on_lost,
            device=device,
            agree=no_peers if self._group is None else self._group.agree,
        )
        self._ring.start()

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Loads an adapter; returns the bytes of it that this rank keeps."""
        return self.loaded.adapters.load(slot, weights)

    def unload_adapter(self, slot: int) -> None:
        """Unloads an adapter. To be called when no request that names it is left."""
        self.loaded.adapters.unload(slot)

    def stats(self) -> RankStats:
        return rank_stats(self._rank, self._denoisers, self.loaded, self._ring.stats())


def rank_stats(rank: int, denoisers: Denoisers, loaded: LoadedRank, ring: RingStats) -> RankStats:
    """Returns the figures of this process's rank."""
    device_map = None
    if loaded.residency.has_device_map:  # quantised models have a map even if none is configured
        models: dict[str, Any] = {component: shard.model for component, shard in loaded.shards.items()}
        device_map = {
            f"{component}.{name}".removesuffix("."): str(device)
            for component, model in models.items()
            for name, device in model.hf_device_map.items()
        }
    return RankStats(
        rank=rank,
        pid=os.getpid(),
        blocks={
            name: loaded.shards[name].blocks or (0, len(cuttable_names(skeleton)))
            for name, skeleton in denoisers.skeletons.items()
        },
        memory=loaded.residency.stats(),
        device_map=device_map,
        num_micro_batches=ring.num_computed,
        compute_s=ring.busy_s,
        bytes_sent=ring.bytes_sent,
    )

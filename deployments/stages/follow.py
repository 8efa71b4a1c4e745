"""One of the ranks after the first: its blocks, and its place in the ring."""

import os
from collections.abc import Callable
from typing import Any

import torch

from cluster.meeting import MeetingPoint
from cluster.open_transport import open_transport
from cluster.place import Rendezvous
from cluster.ring import Ring, RingStats, no_peers
from cluster.transport import join_store
from deployments.config import ModelConfig, TransformerConfig
from deployments.engine.adapters import AdapterWeights
from deployments.engine.blocks import cuttable_names, shape_only_inputs
from deployments.engine.load import Denoisers, LoadedRank, load_rank, open_denoisers, open_parallel
from deployments.engine.merge import build_mergers
from deployments.engine.outline import Holder
from deployments.engine.work import Follower
from deployments.memory.keeper import Keeper
from deployments.stats import RankStats


class Following:
    """Rank `rank` of a shard group."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, rank: int, meeting: MeetingPoint | None = None
    ) -> None:
        """meeting: where those that share this rank's forwards are met, if any do."""
        torch.set_num_threads(config.num_threads)
        self._rank, self._config = rank, config
        self._denoisers = open_denoisers(model, config)
        self._store = None
        if meeting is not None:
            self._store = join_store(meeting.host, meeting.port, config.num_ranks)
        self._group, parallel = open_parallel(self._denoisers, config, rank, self._store)
        self.loaded = load_rank(self._denoisers, model, config, rank, parallel)

    @property
    def keeper(self) -> Keeper:
        return self.loaded.keeper

    def connect(self, rendezvous: Rendezvous, on_lost: Callable[[BaseException], None]) -> None:
        """Meet the other ranks and begin to work. on_lost: the group is no more."""
        device, skeletons, degree = self._denoisers.device, self._denoisers.skeletons, self._config.parallel_degree
        is_first = self._rank < degree
        follower = Follower(
            self.loaded,
            build_mergers(skeletons),
            Holder(device),
            self.keeper.release,
            shape_only={name: shape_only_inputs(of) for name, of in skeletons.items()} if is_first else {},
            is_heard=self._rank % degree == 0,
        )
        self._ring = Ring(
            follower.run,
            rank=self._rank,
            transport=open_transport(self._rank, rendezvous, device=device, store=self._store),
            on_failure=on_lost,
            device=device,
            agree=no_peers if self._group is None else self._group.agree,
        )
        self._ring.start()

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Bytes of what is kept of it here."""
        return self.loaded.adapters.load(slot, weights)

    def unload_adapter(self, slot: int) -> None:
        """No request that names it is left."""
        self.loaded.adapters.unload(slot)

    def stats(self) -> RankStats:
        return rank_stats(self._rank, self._denoisers, self.loaded, self._ring.stats())


def rank_stats(rank: int, denoisers: Denoisers, loaded: LoadedRank, ring: RingStats) -> RankStats:
    """What this process's rank holds and has done."""
    device_map = None
    if loaded.keeper.has_device_map:  # what is quantised has a map that nobody asked for
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
        memory=loaded.keeper.stats(),
        device_map=device_map,
        num_micro_batches=ring.num_computed,
        compute_s=ring.busy_s,
        bytes_sent=ring.bytes_sent,
    )

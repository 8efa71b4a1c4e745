"""One of the ranks after the first: its blocks, and its place in the ring."""

import os
from collections.abc import Callable

import torch

from cluster.open_transport import open_transport
from cluster.place import Rendezvous
from cluster.ring import Ring, RingStats
from deployments.config import ModelConfig, TransformerConfig
from deployments.engine.load import Denoiser, LoadedRank, load_rank, open_denoiser
from deployments.engine.merge import Merger
from deployments.engine.outline import Holder
from deployments.engine.work import Follower
from deployments.stats import RankStats


class Following:
    """Rank `rank` of a shard group."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, rank: int) -> None:
        torch.set_num_threads(config.num_threads)
        self._rank = rank
        self._denoiser = open_denoiser(model, config)
        self._loaded = load_rank(self._denoiser, model, config, rank)

    def connect(self, rendezvous: Rendezvous, on_lost: Callable[[BaseException], None]) -> None:
        """Meet the other ranks and begin to work. on_lost: the group is no more."""
        device = self._denoiser.device
        merger = Merger(self._denoiser.model_class.__name__)
        follower = Follower(self._loaded, merger, Holder(device), self._loaded.keeper.release)
        self._ring = Ring(
            follower.run,
            rank=self._rank,
            transport=open_transport(self._rank, rendezvous, device=device),
            on_failure=on_lost,
            device=device,
        )
        self._ring.start()

    def stats(self) -> RankStats:
        return rank_stats(self._rank, self._denoiser, self._loaded, self._ring.stats())


def rank_stats(rank: int, denoiser: Denoiser, loaded: LoadedRank, ring: RingStats) -> RankStats:
    """What this process's rank holds and has done."""
    is_spread = loaded.keeper.has_device_map  # what is quantised has a map that nobody asked for
    device_map = getattr(loaded.shard.model, "hf_device_map", None) if is_spread else None
    return RankStats(
        rank=rank,
        pid=os.getpid(),
        blocks=loaded.shard.blocks or (0, len(denoiser.block_names)),
        memory=loaded.keeper.stats(),
        device_map=None if device_map is None else {name: str(device) for name, device in device_map.items()},
        num_micro_batches=ring.num_computed,
        compute_s=ring.busy_s,
        bytes_sent=ring.bytes_sent,
    )

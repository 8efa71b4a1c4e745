"""Figures that a stage reports to `/v1/status`, `relay status` and the metrics. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from deployments.engine.queue_stats import StepQueueStats
from deployments.memory.stats import MemoryStats


@dataclass(frozen=True)
class EncoderStats:
    """Counts since the replica started."""

    pid: int
    memory: MemoryStats
    num_in_flight: int
    """Requests in progress."""
    num_forwards: int
    """Prompts encoded."""
    num_cache_hits: int
    batch_sizes: Mapping[int, int]
    """Number of text encoder forwards by their number of prompts."""
    num_cached: int
    cached_bytes: int


@dataclass(frozen=True)
class RankStats:
    """One rank of a shard group, since it started."""

    rank: int
    pid: int
    blocks: Mapping[str, tuple[int, int]]
    """The range of blocks that the rank holds of each denoiser, by component name."""
    memory: MemoryStats
    device_map: Mapping[str, str] | None
    """accelerate's `hf_device_map` of each denoiser, if `device_map` is set."""
    num_micro_batches: int
    compute_s: float
    bytes_sent: int


@dataclass(frozen=True)
class VaeStats:
    """Counts since the replica started."""

    pid: int
    memory: MemoryStats
    num_in_flight: int
    """Images and videos in progress."""
    num_decoded: int
    num_tiles: int
    """Tiles decoded for other replicas."""
    num_written: int
    """Images and videos that the replica wrote to their target instead of returning them."""


@dataclass(frozen=True)
class TransformerStats:
    """Figures of one replica's shard group."""

    queue: StepQueueStats
    ranks: tuple[RankStats, ...]
    adapters: tuple[str, ...]
    """Names of the LoRA adapters that are loaded."""
    occupied_s: float
    """How long at least one micro-batch was in flight in the ring."""

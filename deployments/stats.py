"""What a stage tells of itself: to `/v1/status`, to `relay status`, to the metrics. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.turn import TurnStats
from deployments.engine.step_queue import StepQueueStats


@dataclass(frozen=True)
class VramLimitStats:
    """One model under `vram_limit_gib`: its weights, as they are stored."""

    kept_bytes: int
    """What stays on the device once it has come."""
    peak_bytes: int
    """The most that was there at once: kept, at work, fetched ahead."""
    num_kept: int
    num_streamed: int
    streamed_bytes: int
    """Copied in since the start, what is kept not counted."""


@dataclass(frozen=True)
class NeedStats:
    """What one kind of call needs on its device, weights included."""

    call: str
    num_merged: int
    num_bytes: int
    is_measured: bool
    """False: foreseen, for it has not run yet, or not on CUDA."""


@dataclass(frozen=True)
class MemoryStats:
    """What one process holds of a model, and how."""

    weights_bytes: Mapping[str, int]
    """Parameters and buffers by "device dtype"; "offloaded dtype" for what is elsewhere until it is needed."""
    applied: tuple[str, ...]
    """Memory techniques, in the order they were applied."""
    mapped_bytes: int
    """Of the parameters, what lies in mapped files of the checkpoint: memory that the kernel can have back."""
    peak_allocated_bytes: int
    """On the GPU since the start, weights and activations; on the CPU the largest resident set of the process."""
    peak_reserved_bytes: int
    """On the GPU by torch's allocator; on the CPU as above."""
    vram_limits: tuple[VramLimitStats, ...]
    """One per model of the stage, where it has a limit."""
    turns: TurnStats | None
    """Where the stage is `on_demand`."""
    limit_bytes: int | None
    """This process's share of its device; None: not limited."""
    needs: tuple[NeedStats, ...]
    """Where there is a limit, of the sizes that were asked for so far."""

    def metrics(self) -> dict[str, float]:
        """By the names in cluster/metrics.py."""
        return {
            "relay_weights_bytes": sum(self.weights_bytes.values()),
            "relay_peak_memory_bytes": self.peak_reserved_bytes,
            "relay_streamed_bytes_total": sum(limit.streamed_bytes for limit in self.vram_limits),
        }


@dataclass(frozen=True)
class EncoderStats:
    """Counts since the replica started."""

    pid: int
    memory: MemoryStats
    num_in_flight: int
    """Requests that it is at, now."""
    num_forwards: int
    """Prompts encoded."""
    num_cache_hits: int
    batch_sizes: Mapping[int, int]
    """How many forwards of text encoders ran for so many prompts."""
    num_cached: int
    cached_bytes: int


@dataclass(frozen=True)
class RankStats:
    """One rank of a shard group, since it started."""

    rank: int
    pid: int
    blocks: Mapping[str, tuple[int, int]]
    """The range of blocks that it holds of each denoiser, by component name."""
    memory: MemoryStats
    device_map: Mapping[str, str] | None
    """accelerate's `hf_device_map` of each denoiser, where `device_map` is set."""
    num_micro_batches: int
    compute_s: float
    bytes_sent: int


@dataclass(frozen=True)
class VaeStats:
    """Counts since the replica started."""

    pid: int
    memory: MemoryStats
    num_in_flight: int
    """Pictures and videos that it is at, now."""
    num_decoded: int
    num_tiles: int
    """Decoded for other replicas."""


@dataclass(frozen=True)
class TransformerStats:
    """One replica's shard group."""

    queue: StepQueueStats
    ranks: tuple[RankStats, ...]
    adapters: tuple[str, ...]
    """Names of the LoRA adapters that are loaded."""
    occupied_s: float
    """How long anything was in flight in the ring."""

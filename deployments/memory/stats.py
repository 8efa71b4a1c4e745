"""Statistics of a process's memory: weights, techniques, limits, estimates. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.machines.device_lease import LeaseStats


@dataclass(frozen=True)
class VramLimitStats:
    """The weights of one model under `vram_limit_gib`, in bytes as stored."""

    kept_bytes: int
    """Weights that stay on the device once they are there."""
    peak_bytes: int
    """Most weights on the device at once: kept, in use, and fetched ahead."""
    num_kept: int
    num_streamed: int
    streamed_bytes: int
    """Copied to the device since the start, without the kept weights."""


@dataclass(frozen=True)
class MemoryEstimateStats:
    """The memory that one kind of call needs on its device, weights included."""

    call: str
    num_merged: int
    num_bytes: int
    is_measured: bool
    """False: only estimated, because the call has not run yet, or does not run on a GPU."""


@dataclass(frozen=True)
class MemoryStats:
    """The memory that one process uses for a model."""

    weights_bytes: Mapping[str, int]
    """Bytes of parameters and buffers by "device dtype"; by "offloaded dtype" for weights that are brought to the
    device only when they are needed."""
    applied: tuple[str, ...]
    """Memory techniques, in the order they were applied."""
    mapped_bytes: int
    """Bytes of the parameters that lie in mapped checkpoint files: the kernel can reclaim this memory."""
    peak_allocated_bytes: int
    """Peak since the start: on a GPU, weights and activations; on the CPU, the process's resident set."""
    peak_reserved_bytes: int
    """Peak since the start: on a GPU, what torch's allocator has reserved; on the CPU, the resident set."""
    vram_limits: tuple[VramLimitStats, ...]
    """One per model of the stage if `vram_limit_gib` is set, else none."""
    lease: LeaseStats | None
    """Device leases of this process; None unless the stage has `time_sharing`."""
    limit_bytes: int | None
    """This process's share of its device; None: not limited."""
    estimates: tuple[MemoryEstimateStats, ...]
    """Estimates for the request sizes seen so far; none without a limit."""

    def metrics(self) -> dict[str, float]:
        """Returns the values of metrics by their names in cluster/metrics.py."""
        return {
            "relay_weights_bytes": sum(self.weights_bytes.values()),
            "relay_peak_memory_bytes": self.peak_reserved_bytes,
            "relay_streamed_bytes_total": sum(limit.streamed_bytes for limit in self.vram_limits),
        }

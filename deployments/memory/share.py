"""What of a device's memory is a process's own: planned from its config, kept by torch's own cap."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deployments.config import StageConfig, TransformerConfig
from deployments.plan.sizes import OVERHEAD_BYTES
from deployments.refusal import OutOfShare


@dataclass(frozen=True)
class Share:
    """Of one process. Weights and tensors may take `limit_bytes`; None: nothing is known, nothing is held."""

    limit_bytes: int | None = None
    is_capped: bool = False
    """Whether torch refuses more; else the device does, or nobody."""
    reason: str = ""
    """Which settings it comes from."""

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around work on the device: raises OutOfShare where torch is out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            limit = "the GPU's memory" if self.limit_bytes is None else f"{gib(self.limit_bytes)} ({self.reason})"
            raise OutOfShare(
                f"out of memory: the stage has {limit}; ask for a smaller size, or give it more by num_gpus or "
                f"memory_limit_gib, or set max_batch_tokens lower; torch says: {str(error).partition(chr(10))[0]}"
            ) from error


def plan_share(config: StageConfig, total_bytes: int | None) -> Share:
    """total_bytes: of the stage's GPU; None on the CPU.

    A fraction of a GPU is that of its bytes, less what a process takes outside of torch's sight. A stage with a
    whole GPU, or that has a GPU by turns, has all of it, and needs no cap.
    """
    if config.memory_limit_gib is not None:
        limit_bytes = int(config.memory_limit_gib * 2**30)
        return Share(limit_bytes, total_bytes is not None, f"memory_limit_gib: {config.memory_limit_gib:g}")
    spreads = isinstance(config, TransformerConfig) and config.device_map is not None
    if total_bytes is None or spreads or config.num_gpus > 1:
        return Share()
    is_fraction = 0 < config.num_gpus < 1 and config.on_demand is None
    share = config.num_gpus if is_fraction else 1.0
    reason = f"num_gpus: {share:g} of {gib(total_bytes)}, less {gib(OVERHEAD_BYTES)} of CUDA's own"
    return Share(max(0, int(share * total_bytes) - OVERHEAD_BYTES), is_fraction, reason)


def take_share(config: StageConfig, device: torch.device) -> Share:
    """Plans it and, on CUDA, has torch hold this process to it. Before anything is loaded."""
    if device.type != "cuda":
        return plan_share(config, None)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    share = plan_share(config, total_bytes)
    if share.is_capped and share.limit_bytes is not None:
        fraction = min(1.0, share.limit_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, device.index)
    return share


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"

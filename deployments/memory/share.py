"""A process's own share of its device, kept by torch's own cap."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deployments.config import StageConfig
from deployments.memory.limit import Limit, gib, plan_limit
from deployments.refusal import OutOfShare


@dataclass(frozen=True)
class Share:
    """Of one process. No limit: nothing is known, nothing is held."""

    limit: Limit | None = None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around work on the device: raises OutOfShare where torch is out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            limit = self.limit
            has = "the GPU's memory" if limit is None else f"{gib(limit.num_bytes)} ({limit.reason})"
            raise OutOfShare(
                f"out of memory: the stage has {has}; ask for a smaller size, or give it more by num_gpus or "
                f"memory_limit_gib, or set max_batch_tokens lower; torch says: {str(error).partition(chr(10))[0]}"
            ) from error.with_traceback(None)  # whose frames hold the tensors that were too many


def take_share(config: StageConfig, device: torch.device) -> Share:
    """Plans it and, on CUDA, has torch hold this process to it. Before anything is loaded."""
    if device.type != "cuda":
        return Share(plan_limit(config, None))
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    limit = plan_limit(config, total_bytes)
    if limit is not None and limit.is_capped:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit.num_bytes / total_bytes), device.index)
    return Share(limit)

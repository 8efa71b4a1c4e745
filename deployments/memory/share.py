"""A process's own share of its device, kept by torch's own cap."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster import accelerator
from deployments.config import StageConfig
from deployments.memory.limit import Limit, gib, plan_limit
from deployments.refusal import OutOfShare

OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""What libraries say that ask the driver themselves, past torch's allocator: plain RuntimeErrors."""


@dataclass(frozen=True)
class Share:
    """Of one process. No limit: nothing is known, nothing is held."""

    limit: Limit | None = None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around work on the device: raises OutOfShare where torch is out of memory."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that were too many
            limit = self.limit
            has = "the GPU's memory" if limit is None else f"{gib(limit.num_bytes)} ({limit.reason})"
            raise OutOfShare(
                f"out of memory: the stage has {has}; ask for a smaller size, or give it more by num_gpus or "
                f"memory_limit_gib, or set max_batch_tokens lower; torch says: {str(error).partition(chr(10))[0]}"
            ) from error.with_traceback(None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """By whatever name."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def take_share(config: StageConfig, device: torch.device) -> Share:
    """Plans it and, on a GPU, has torch hold this process to it. Before anything is loaded."""
    if not accelerator.is_accelerator(device):
        return Share(plan_limit(config, None))
    accelerator.load_libraries(device)
    limit = plan_limit(config, accelerator.total_bytes(device))
    if limit is not None and limit.is_capped:
        accelerator.limit_bytes(device, limit.num_bytes)
    return Share(limit)

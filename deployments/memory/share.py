"""A process's share of its device, enforced by torch's allocator."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster.machines import accelerator
from deployments.config.stage import StageConfig
from deployments.errors import OutOfDeviceMemory
from deployments.memory.limit import Limit, gib, plan_limit

OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""Out-of-memory messages of libraries that allocate from the driver, not from torch: plain RuntimeErrors."""


@dataclass(frozen=True)
class Share:
    """One process's share of its device. Without a limit, the share is unknown and not enforced."""

    limit: Limit | None = None

    @contextmanager
    def translating_oom(self) -> Iterator[None]:
        """Context around work on the device: raises OutOfDeviceMemory if torch runs out of memory."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the device
            limit = self.limit
            has = "the GPU's memory" if limit is None else f"{gib(limit.num_bytes)} ({limit.reason})"
            raise OutOfDeviceMemory(
                f"out of memory: the stage has {has}; ask for a smaller size, or give it more with num_gpus "
                "or memory_limit_gib, or set max_batch_tokens lower; torch says: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error.with_traceback(None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means that the device is out of memory, whichever library reports it."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def take_share(config: StageConfig, device: torch.device) -> Share:
    """Plans this process's share and, on a GPU, makes torch enforce it. Call it before anything is loaded."""
    if not accelerator.is_accelerator(device):
        return Share(plan_limit(config, None))
    accelerator.load_libraries(device)
    limit = plan_limit(config, accelerator.total_bytes(device))
    if limit is not None and limit.is_capped:
        accelerator.limit_bytes(device, limit.num_bytes)
    return Share(limit)

"""The share of its device that a process may fill, computed from its config without torch."""

from dataclasses import dataclass

from deployments.config.stage import SpreadConfig, StageConfig

CONTEXT_BYTES = int(0.45 * 2**30)
"""GPU memory of each process that torch does not count: the CUDA context, loaded kernels, NCCL's buffers. Like
WORKSPACE_BYTES, assumed until a GPU has been measured."""
WORKSPACE_BYTES = int(0.3 * 2**30)
"""GPU memory of each process that torch counts: workspaces of cuBLAS and cuDNN, memory that its allocator cannot
reuse."""
OVERHEAD_BYTES = CONTEXT_BYTES + WORKSPACE_BYTES
"""GPU memory of each process besides weights and tensors."""
OTHERS_SHARING = 2
"""Number of other stages that share a GPU's time with one stage: the two others of its model are assumed to."""


@dataclass(frozen=True)
class Limit:
    """Limit of the weights and tensors of one process."""

    num_bytes: int
    is_capped: bool
    """Whether torch enforces the limit; if not, the device does, or nothing."""
    reason: str
    """The settings that the limit comes from."""


def plan_limit(config: StageConfig, total_bytes: int | None) -> Limit | None:
    """Returns a process's limit; None if there is none, or only the device's own. total_bytes: memory of the
    stage's GPU; None on the CPU.

    A fraction of a GPU is that fraction of its bytes, less the memory of a process that torch does not count. A
    stage that has a whole GPU, or shares a GPU's time, has all of its memory.
    """
    if config.memory_limit_gib is not None:
        num_bytes = int(config.memory_limit_gib * 2**30)
        return Limit(num_bytes, total_bytes is not None, f"memory_limit_gib: {config.memory_limit_gib:g}")
    spreads = isinstance(config, SpreadConfig) and config.device_map is not None
    if total_bytes is None or spreads or config.num_gpus > 1:
        return None
    if config.time_sharing is not None:
        taken = CONTEXT_BYTES + OTHERS_SHARING * OVERHEAD_BYTES
        reason = f"time_sharing: all of {gib(total_bytes)}, less {gib(taken)} that idle stages and the driver keep"
        return Limit(max(0, total_bytes - taken), False, reason)
    share = config.num_gpus if 0 < config.num_gpus < 1 else 1.0
    reason = f"num_gpus: {share:g} of {gib(total_bytes)}, less {gib(CONTEXT_BYTES)} for the driver"
    return Limit(max(0, int(share * total_bytes) - CONTEXT_BYTES), share < 1, reason)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"

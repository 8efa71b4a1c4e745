"""How much of its device a process may fill: arithmetic on its config, without torch."""

from dataclasses import dataclass

from deployments.config import SpreadConfig, StageConfig

CONTEXT_BYTES = int(0.45 * 2**30)
"""Of each process on its GPU, outside of torch's sight: CUDA's context, the kernels it has loaded, NCCL's buffers.
Assumed until a GPU has been measured, as the next."""
WORKSPACE_BYTES = int(0.3 * 2**30)
"""Of each process, in torch's sight: workspaces of cuBLAS and cuDNN, what the allocator cannot use again."""
OVERHEAD_BYTES = CONTEXT_BYTES + WORKSPACE_BYTES
"""Of each process on its GPU, besides weights and tensors."""
OTHERS_BY_TURNS = 2
"""Stages that share a GPU by turns with one: all three of a model, else it would not be by turns."""


@dataclass(frozen=True)
class Limit:
    """Of weights and tensors of one process."""

    num_bytes: int
    is_capped: bool
    """Whether torch is to refuse more; else the device does, or nobody."""
    reason: str
    """Which settings it comes from."""


def plan_limit(config: StageConfig, total_bytes: int | None) -> Limit | None:
    """total_bytes: of the stage's GPU; None on the CPU. None where nothing is limited, or only by the device.

    A fraction of a GPU is that of its bytes, less what a process takes outside of torch's sight. A stage with a
    whole GPU, or that has a GPU by turns, has all of it.
    """
    if config.memory_limit_gib is not None:
        num_bytes = int(config.memory_limit_gib * 2**30)
        return Limit(num_bytes, total_bytes is not None, f"memory_limit_gib: {config.memory_limit_gib:g}")
    spreads = isinstance(config, SpreadConfig) and config.device_map is not None
    if total_bytes is None or spreads or config.num_gpus > 1:
        return None
    if config.on_demand is not None:
        taken = CONTEXT_BYTES + OTHERS_BY_TURNS * OVERHEAD_BYTES
        reason = f"on_demand: all of {gib(total_bytes)}, less {gib(taken)} that each stage keeps when it is away"
        return Limit(max(0, total_bytes - taken), False, reason)
    share = config.num_gpus if 0 < config.num_gpus < 1 else 1.0
    reason = f"num_gpus: {share:g} of {gib(total_bytes)}, less {gib(CONTEXT_BYTES)} of the driver's own"
    return Limit(max(0, int(share * total_bytes) - CONTEXT_BYTES), share < 1, reason)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"

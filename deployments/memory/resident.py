"""How many bytes of weights are on a stage's device at once, at most, told from skeletons as stored."""

from collections.abc import Mapping

from torch import nn

from deployments.memory.config import MemoryConfig, OffloadConfig
from deployments.memory.stored import stored_bytes
from deployments.memory.vram_limit import least_bytes


def device_bytes(models: Mapping[str, nn.Module], config: MemoryConfig) -> int:
    """Of all models of a stage, each from `as_stored`."""
    sizes = {name: stored_bytes(model) for name, model in models.items()}
    if config.vram_limit_gib is not None:
        limit, total = int(config.vram_limit_gib * 2**30), max(1, sum(sizes.values()))
        # As the stage shares it out: by size.
        return sum(min(sizes[n], max(limit * sizes[n] // total, least_bytes(m))) for n, m in models.items())
    if config.offload is None:
        return sum(sizes.values())
    if config.offload.kind == "model":
        return max(sizes.values())  # the next one to come sends the one before away
    return max(_streamed_bytes(model, config.offload) for model in models.values())


def _streamed_bytes(model: nn.Module, config: OffloadConfig) -> int:
    """Layer by layer, or some blocks at a time and all that is in no block; `use_stream` fetches one ahead."""
    ahead = 2 if config.use_stream else 1
    if config.kind != "group" or config.level == "leaf":
        return ahead * max(stored_bytes(module) for module in model.modules() if not any(module.children()))
    blocks = [
        stored_bytes(block)
        for part in model.children()
        if isinstance(part, nn.ModuleList | nn.Sequential)
        for block in part
    ]
    rest = stored_bytes(model) - sum(blocks)
    return rest + ahead * config.blocks_per_group * max(blocks, default=0)

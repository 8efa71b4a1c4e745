"""The most bytes of weights that a stage has on its device at once, computed from its skeletons as stored."""

from collections.abc import Mapping

from torch import nn

from deployments.memory.config import MemoryConfig, OffloadConfig
from deployments.memory.stored import stored_bytes
from deployments.memory.vram_limit import least_bytes


def device_bytes(models: Mapping[str, nn.Module], config: MemoryConfig) -> int:
    """Returns the most bytes of weights on the device at once. models: all of a stage, each from `as_stored`."""
    sizes = {name: stored_bytes(model) for name, model in models.items()}
    if config.vram_limit_gib is not None:
        limit, total = int(config.vram_limit_gib * 2**30), max(1, sum(sizes.values()))
        # The stage divides its limit among its models in proportion to their sizes.
        return sum(min(sizes[n], max(limit * sizes[n] // total, least_bytes(m))) for n, m in models.items())
    if config.offload is None:
        return sum(sizes.values())
    if config.offload.kind == "model":
        return max(sizes.values())  # a model that comes to the device sends the others away
    return max(_streamed_bytes(model, config.offload) for model in models.values())


def _streamed_bytes(model: nn.Module, config: OffloadConfig) -> int:
    """Returns the most bytes of one model on the device at once.

    They are the largest layer; or, with offloading by blocks, one group of blocks and all weights outside of
    blocks. `use_stream` fetches one more layer or group ahead.
    """
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

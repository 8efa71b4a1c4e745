"""torch.compile of a stage's model, whole or block by block."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from deployments.memory.config import CompileConfig

RECOMPILE_LIMIT = 1000
"""Limit of graphs per function, for one object and for all: every hook, block kind and size may need a graph."""


def compile_model(model: nn.Module, config: CompileConfig) -> None:
    """Compiles the model in place. Graphs are made at the first call of every kind, in the calling thread."""
    options = {
        "mode": None if config.mode == "default" else config.mode,
        "fullgraph": config.fullgraph,
        "dynamic": config.dynamic,
        "backend": config.backend,
    }
    # A VAE is called through its decode, not its forward.
    parts = repeated_blocks(model) if config.scope == "blocks" else [getattr(model, "decoder", model)]
    for part in parts:
        part.compile(**options)
        call = _in_any_thread(part._compiled_call_impl)
        part._compiled_call_impl = copied(call) if config.has_graphs else call


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that `compile_repeated_blocks` would compile, if the model's class names them; else the
    entries of the model's outermost module lists."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    blocks = []
    for child in model.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return [block for block in blocks if any(True for _ in block.parameters())]  # a shard's stubs have none


def copied(compiled: Any) -> Any:
    """Returns the function with its outputs copied: a CUDA graph returns the same tensors at every call, and the
    next call may come before they are read."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))

    return call


def _in_any_thread(compiled: Any) -> Any:
    """Returns the function with dynamo's settings applied in each calling thread: dynamo compiles in the thread
    that calls, and settings are per thread.

    Source of the settings, which quantised and offloaded models need:
    https://huggingface.co/docs/diffusers/optimization/speed-memory-optims
    """
    settings = torch._dynamo.config

    def call(*args: Any, **kwargs: Any) -> Any:
        if settings.recompile_limit != RECOMPILE_LIMIT:
            settings.recompile_limit = settings.accumulated_recompile_limit = RECOMPILE_LIMIT
            settings.capture_dynamic_output_shape_ops = True
        return compiled(*args, **kwargs)

    return call

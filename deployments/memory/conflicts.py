"""The techniques that do not combine, why, and what to use instead; found by trying pairs on tiny models on a CPU.

Some pairs are refused although they run on the CPU: if host and device are the same, hooks move nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Conflict(NamedTuple):
    """Two techniques that do not combine. Each is a key of `ASKED`, which tells whether a config uses it."""

    one: str
    other: str
    reason: str
    """Why, and what to do instead."""


def _num_shards(config: Any) -> int:
    return getattr(config, "num_shards", 1)


ASKED: dict[str, Callable[[Any], bool]] = {
    "quantization": lambda c: c.quantization is not None,
    "quantization: nf4 or fp4": lambda c: c.quantization is not None and c.quantization.kind != "int8",
    "quantization: int8": lambda c: c.quantization is not None and c.quantization.kind == "int8",
    "layerwise_casting": lambda c: c.layerwise_casting is not None,
    "offload": lambda c: c.offload is not None,
    "host_copy: files": lambda c: c.host_copy == "files",
    "time_sharing": lambda c: c.time_sharing is not None,
    "offload: sequential or disk": lambda c: c.offload is not None and c.offload.kind in {"sequential", "disk"},
    "offload: sequential, group or disk": lambda c: c.offload is not None and c.offload.kind != "model",
    "offload: group": lambda c: c.offload is not None and c.offload.kind == "group",
    "offload: group without use_stream": lambda c: (
        c.offload is not None
        and c.offload.kind == "group"
        and not c.offload.use_stream
        and c.offload.folder is None
    ),
    "offload: group by blocks": lambda c: (
        c.offload is not None
        and c.offload.kind == "group"
        and c.offload.level == "block"
        and c.offload.folder is None
    ),
    "offload: group with folder": lambda c: (
        c.offload is not None and c.offload.kind == "group" and c.offload.folder
    ),
    "channels_last": lambda c: c.channels_last,
    "vram_limit_gib": lambda c: c.vram_limit_gib is not None,
    "compile": lambda c: c.compile is not None,
    "compile.fullgraph": lambda c: c.compile is not None and c.compile.fullgraph,
    "compile: blocks": lambda c: c.compile is not None and c.compile.scope == "blocks",
    "compile.mode with CUDA graphs": lambda c: c.compile is not None and c.compile.has_graphs,
    "trace": lambda c: c.trace,
    "device_map": lambda c: getattr(c, "device_map", None) is not None,
    "shards": lambda c: _num_shards(c) > 1,
    "context_parallel": lambda c: getattr(c, "context_parallel", 1) > 1,
    "tensor_parallel": lambda c: getattr(c, "tensor_parallel", 1) > 1,
    "context_parallel or tensor_parallel": lambda c: getattr(c, "parallel_degree", 1) > 1,
    "transport: object_store": lambda c: getattr(c, "transport", None) == "object_store",
    "shards with compile: model": lambda c: (
        _num_shards(c) > 1 and c.compile is not None and c.compile.scope == "model"
    ),
}

_NO_HOOKS = "a traced graph calls no hooks: use compile: blocks"
_FIXED = "a CUDA graph holds its weights' addresses: use mode default or max-autotune-no-cudagraphs"
_COME_AND_GO = "weights are moved between graphs: leave out fullgraph"

_HELD_TWICE = "8-bit layers hold a second copy of their weights, which would stay on the GPU: use offload: model"
_PARTS = "each rank has a part of each large matrix"
_UNLIKE_FILES = "weights differ from those in the files: leave out host_copy"

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "quantization",
        "layerwise_casting",
        "quantised weights have 8 bits or fewer already and must not be cast: leave out layerwise_casting",
    ),
    Conflict(
        "quantization: nf4 or fp4",
        "offload: sequential or disk",
        "4-bit weights cannot leave their layer's state on the meta device: use offload: model, or group",
    ),
    Conflict(
        "quantization: nf4 or fp4",
        "offload: group without use_stream",
        "the scales of 4-bit weights leave the GPU with them and do not come back: use use_stream: true",
    ),
    Conflict(
        "quantization: nf4 or fp4",
        "offload: group by blocks",
        "layers outside of blocks move without a stream, and so without their scales: use level: leaf",
    ),
    Conflict("quantization: int8", "offload: sequential or disk", _HELD_TWICE),
    Conflict("quantization: int8", "offload: group", _HELD_TWICE),
    Conflict(
        "quantization",
        "vram_limit_gib",
        "bitsandbytes' weights cannot be moved one by one: use offload: model, or time_sharing",
    ),
    Conflict(
        "channels_last",
        "offload: group with folder",
        "the folder's files keep weights in the default memory format: leave out channels_last, or the folder",
    ),
    Conflict("offload", "vram_limit_gib", "both move the same weights: leave out one of them"),
    Conflict("host_copy: files", "layerwise_casting", f"cast {_UNLIKE_FILES}"),
    Conflict("host_copy: files", "quantization", f"quantised {_UNLIKE_FILES}"),
    Conflict("time_sharing", "offload", "time_sharing moves all weights itself: leave out offload"),
    Conflict(
        "time_sharing", "device_map", "weights that accelerate has placed are not moved: leave out time_sharing"
    ),
    Conflict("offload", "device_map", "device_map offloads by max_memory: leave out offload"),
    Conflict("vram_limit_gib", "device_map", "device_map offloads by max_memory: leave out vram_limit_gib"),
    Conflict(
        "compile.fullgraph",
        "offload: sequential, group or disk",
        _COME_AND_GO,
    ),
    Conflict("compile.fullgraph", "vram_limit_gib", _COME_AND_GO),
    Conflict("compile.fullgraph", "layerwise_casting", "weights are cast between graphs: leave out fullgraph"),
    Conflict(
        "compile.fullgraph",
        "shards with compile: model",
        "a shard's forward ends at its cut, which breaks the graph: use compile: blocks, or leave out fullgraph",
    ),
    Conflict(
        "compile.mode with CUDA graphs",
        "offload",
        _FIXED,
    ),
    Conflict(
        "compile.mode with CUDA graphs",
        "vram_limit_gib",
        _FIXED,
    ),
    Conflict("compile.mode with CUDA graphs", "time_sharing", _FIXED),
    Conflict(
        "compile.mode with CUDA graphs",
        "compile: blocks",
        "a block's graph reuses the memory of the graph before it, whose output it reads: use scope: model",
    ),
    Conflict("trace", "compile", "one compiler is enough: leave out trace"),
    Conflict("trace", "offload", _NO_HOOKS),
    Conflict("trace", "vram_limit_gib", _NO_HOOKS),
    Conflict("trace", "layerwise_casting", _NO_HOOKS),
    Conflict("trace", "quantization", "bitsandbytes' layers cannot be traced: use compile: blocks"),
    Conflict("trace", "device_map", _NO_HOOKS),
    Conflict("trace", "shards", "a traced graph cannot be cut: leave out trace, or shards"),
    Conflict("context_parallel", "tensor_parallel", "both divide the same forwards: leave out one of them"),
    Conflict(
        "context_parallel or tensor_parallel",
        "transport: object_store",
        "ranks that share each forward need connections to each other: leave out transport",
    ),
    Conflict(
        "context_parallel or tensor_parallel",
        "device_map",
        "each rank has all of its weights on its one device: leave out device_map",
    ),
    Conflict(
        "context_parallel or tensor_parallel",
        "time_sharing",
        "ranks that share each forward would wait for each other's lease: leave out time_sharing",
    ),
    Conflict(
        "context_parallel",
        "offload: sequential or disk",
        "accelerate's hooks do not notice that a shared forward ends at its cut: use offload: model or group",
    ),
    Conflict(
        "tensor_parallel", "quantization", f"{_PARTS}, and quantised ones cannot be split: use context_parallel"
    ),
    Conflict(
        "tensor_parallel", "layerwise_casting", f"{_PARTS}, and such parts are not cast: use context_parallel"
    ),
    Conflict(
        "tensor_parallel", "offload", f"{_PARTS}, and such parts are not moved: use context_parallel, or shards"
    ),
    Conflict("tensor_parallel", "vram_limit_gib", f"{_PARTS}, and such parts are not moved: use more shards"),
)


def find_conflict(config: Any) -> str | None:
    """Returns a sentence on the first two techniques of a stage's config that do not combine; None if all do."""
    for one, other, reason in CONFLICTS:
        if ASKED[one](config) and ASKED[other](config):
            return f"{one} and {other} do not combine: {reason}"
    return None

"""Weights that are not read into memory: the checkpoint's files are mapped, and pages are loaded when used.

Loaders map safetensors files, and a weight whose stored dtype is the requested one stays in the mapping. The
kernel reclaims such pages whenever it needs memory.
"""

import bisect
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

MAPS = Path("/proc/self/maps")


def mapped_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Returns how many bytes of the weights lie in mapped safetensors files; 0 on systems without /proc."""
    if not MAPS.exists():
        return 0
    starts, ends = [], []
    for line in MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.partition(" ")[0].partition("-")
            starts.append(int(start, 16))
            ends.append(int(end, 16))

    def is_mapped(weight: torch.Tensor) -> bool:
        i = bisect.bisect_right(starts, weight.data_ptr()) - 1
        return i >= 0 and weight.data_ptr() < ends[i]

    return sum(weight.nbytes for weight in weights if weight.device.type == "cpu" and is_mapped(weight))


def check_mapped(name: str, model: nn.Module, dtype: str) -> None:
    """Raises ValueError if none of the model's weights are mapped, because they are stored in another dtype."""
    if not mapped_bytes(model.parameters()):
        raise ValueError(
            f"host_copy: files needs weights that are stored as {dtype}, but those of {name} are not, so they "
            "were read into memory: set dtype to that of the files, or leave out host_copy"
        )

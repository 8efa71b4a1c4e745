"""Models of one process spread over several GPUs by accelerate, layer after layer; what is too much lies behind
them, on the CPU and on disk.
"""

import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import accelerate
from accelerate.utils import convert_file_size_to_int, get_balanced_memory, send_to_device
from torch import nn

from deployments.config import SpreadConfig

Device = int | str
"""As accelerate has it: a GPU's number, "cpu" or "disk"."""


def memory_by_device(config: SpreadConfig, part: float = 1.0) -> dict[Device, int] | None:
    """`max_memory` as accelerate spells it: bytes by a GPU's number, or "cpu". part: of them, for one model."""
    if config.max_memory is None:
        return None
    return {
        int(key) if key.isdecimal() else key: int(convert_file_size_to_int(size) * part)
        for key, size in config.max_memory.items()
    }


def spread_models(models: Mapping[str, nn.Module], config: SpreadConfig) -> None:
    """In place: all of them, in host memory so far, as if they were one model, so that each GPU has about as much.

    A layer's inputs come to its device, and what the models return to the first's.
    """
    together = nn.ModuleDict(models)
    whole = sorted({name for model in models.values() for name in getattr(model, "_no_split_modules", None) or ()})
    memory = get_balanced_memory(together, memory_by_device(config), no_split_module_classes=whole)
    device_map = accelerate.infer_auto_device_map(together, memory, no_split_module_classes=whole)
    for name, model in models.items():
        _dispatch(model, _part_of(device_map, name))
    first: Any = next(iter(models.values()))
    answers_on = first._hf_hook.execution_device
    for model in models.values():  # pipelines join what several encoders return
        model.register_forward_hook(lambda _model, _inputs, output: send_to_device(output, answers_on))


def _part_of(device_map: Mapping[str, Device], name: str) -> dict[str, Device]:
    """Of one model, its modules by their names in it; "": all of it."""
    return {
        key.removeprefix(name).removeprefix("."): device
        for key, device in device_map.items()
        if key in ("", name) or key.startswith(f"{name}.")
    }


def _dispatch(model: nn.Module, device_map: dict[str, Device]) -> None:
    if device_map == {"": "disk"}:  # of which accelerate would find no weights to write
        device_map = dict.fromkeys((name for name, _ in model.named_children()), "disk")
    folder = None
    if "disk" in device_map.values():
        disk = tempfile.TemporaryDirectory(prefix="latent-relay-")
        weakref.finalize(model, disk.cleanup)
        folder = disk.name
    accelerate.dispatch_model(model, device_map, offload_dir=folder, offload_buffers=True, force_hooks=True)

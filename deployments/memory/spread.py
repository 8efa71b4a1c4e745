"""Spreads the models of one process over several GPUs by accelerate, layer after layer. Layers that do not fit go
to the CPU and then to disk.
"""

import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import accelerate
from accelerate.utils import convert_file_size_to_int, get_balanced_memory, send_to_device
from torch import nn

from deployments.config.stage import SpreadConfig

Device = int | str
"""A device as accelerate names it: a GPU's number, "cpu" or "disk"."""


def memory_by_device(config: SpreadConfig, part: float = 1.0) -> dict[Device, int] | None:
    """Returns `max_memory` in accelerate's form: bytes by GPU number or "cpu". part: share for one model."""
    if config.max_memory is None:
        return None
    return {
        int(key) if key.isdecimal() else key: int(convert_file_size_to_int(size) * part)
        for key, size in config.max_memory.items()
    }


def spread_models(models: Mapping[str, nn.Module], config: SpreadConfig) -> None:
    """Spreads models that are in host memory, in place and as if they were one model, evenly over the GPUs.

    Hooks move each layer's inputs to its device, and all models' outputs to the first model's device.
    """
    together = nn.ModuleDict(models)
    whole = sorted({name for model in models.values() for name in getattr(model, "_no_split_modules", None) or ()})
    memory = get_balanced_memory(together, memory_by_device(config), no_split_module_classes=whole)
    device_map = accelerate.infer_auto_device_map(together, memory, no_split_module_classes=whole)
    for name, model in models.items():
        _dispatch(model, _part_of(device_map, name))
    first: Any = next(iter(models.values()))
    answers_on = first._hf_hook.execution_device
    for model in models.values():  # pipelines concatenate the outputs of several encoders
        model.register_forward_hook(lambda _model, _inputs, output: send_to_device(output, answers_on))


def _part_of(device_map: Mapping[str, Device], name: str) -> dict[str, Device]:
    """Returns one model's part of the map, by the modules' names within the model; "" is the whole model."""
    return {
        key.removeprefix(name).removeprefix("."): device
        for key, device in device_map.items()
        if key in ("", name) or key.startswith(f"{name}.")
    }


def _dispatch(model: nn.Module, device_map: dict[str, Device]) -> None:
    if device_map == {"": "disk"}:  # for this map accelerate finds no weights to write
        device_map = dict.fromkeys((name for name, _ in model.named_children()), "disk")
    folder = None
    if "disk" in device_map.values():
        disk = tempfile.TemporaryDirectory(prefix="latent-relay-")
        weakref.finalize(model, disk.cleanup)
        folder = disk.name
    accelerate.dispatch_model(model, device_map, offload_dir=folder, offload_buffers=True, force_hooks=True)

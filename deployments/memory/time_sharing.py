"""Time sharing of a device: the stage that holds the lease has its weights there, all others in host memory."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cluster.machines import accelerator
from cluster.machines.device_lease import DeviceLease
from deployments.config.stage import StageConfig
from deployments.memory.movable import make_movable
from deployments.memory.pinned import PinnedCopies


class SwappableWeights(Protocol):
    """Weights that move to a device and back to the host as a whole."""

    def load(self) -> None: ...

    def unload(self) -> None: ...


class HostCopies:
    """The weights of a model with permanent copies in host memory: unloading only drops the device's copies."""

    def __init__(self, model: nn.Module, device: torch.device, *, is_pinned: bool = True) -> None:
        """The model's weights must be in host memory. is_pinned: pin them there, for fast copies to a GPU."""
        self._device = device
        self._pinned = PinnedCopies() if is_pinned and accelerator.is_accelerator(device) else None
        self._parameters = [(parameter, self._keep(parameter.data)) for parameter in model.parameters()]
        self._buffers = [
            (module, name, self._keep(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.unload()

    def load(self) -> None:
        """Copies the weights to the device; on the CPU too, so that tests there hold what a GPU would hold."""
        for parameter, host in self._parameters:
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        for module, name, host in self._buffers:
            module._buffers[name] = host.to(self._device, non_blocking=True, copy=True)

    def unload(self) -> None:
        for parameter, host in self._parameters:
            parameter.data = host
        for module, name, host in self._buffers:
            module._buffers[name] = host

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._pinned is None else self._pinned.copy(tensor)


class Moved:
    """A quantised model. Its layers hold more than parameters and buffers, so only their own `to` moves them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        make_movable(model)
        self.unload()

    def load(self) -> None:
        self._model.to(self._device)

    def unload(self) -> None:
        self._model.to("cpu")


def open_swappable(model: nn.Module, device: torch.device, *, is_pinned: bool) -> SwappableWeights:
    """Returns `Moved` for a quantised model, else `HostCopies`. Moves the model to host memory."""
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    return Moved(model, device) if is_quantized else HostCopies(model, device, is_pinned=is_pinned)


def open_lease(config: StageConfig, device: torch.device, swappable: Sequence[SwappableWeights]) -> DeviceLease:
    """Returns a lease for the weights of one process, which must be on the host."""
    assert config.time_sharing is not None

    def load() -> None:
        for weights in swappable:
            weights.load()
        accelerator.synchronize(device)  # so that the measured time includes the copies

    def unload() -> None:
        for weights in swappable:
            weights.unload()
        accelerator.empty_cache(device)

    return DeviceLease(_path(device), load=load, unload=unload, time_slice_s=config.time_sharing.time_slice_s)


def lease_to_load(config: StageConfig, device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which to load a stage: a held lease with `time_sharing` and `quantization`, else empty.

    Weights are quantised on the GPU, so stages that share one must load in turn.
    """
    if config.time_sharing is None or config.quantization is None:
        return nullcontext()
    return DeviceLease(_path(device), unload=partial(accelerator.empty_cache, device)).held()


def _path(device: torch.device) -> Path:
    """Returns the lease's path: equal for all of a user's processes on a node that use the same device, even under
    different device numbers."""
    name = f"gpu-{accelerator.device_uuid(device)}" if accelerator.is_accelerator(device) else "cpu"
    return Path(tempfile.gettempdir()) / f"latent-relay-{os.getuid()}" / name

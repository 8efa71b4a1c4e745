"""Stages share a device by turns: whose turn it is has its weights there, the others theirs in host memory."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cluster import accelerator
from cluster.turn import Turn
from deployments.config import StageConfig
from deployments.memory.movable import make_movable
from deployments.memory.pinned import PinnedCopies


class Guest(Protocol):
    """Weights that come to a device and leave it, all together."""

    def arrive(self) -> None: ...

    def leave(self) -> None: ...


class HostCopies:
    """The weights of a model, which never change: leaving costs nothing, for host memory has them still."""

    def __init__(self, model: nn.Module, device: torch.device, *, is_pinned: bool = True) -> None:
        """The model's weights are in host memory. is_pinned: they are pinned there, for fast copies to CUDA."""
        self._device = device
        self._pinned = PinnedCopies() if is_pinned and accelerator.is_accelerator(device) else None
        self._parameters = [(parameter, self._keep(parameter.data)) for parameter in model.parameters()]
        self._buffers = [
            (module, name, self._keep(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.leave()

    def arrive(self) -> None:
        """On the CPU a real copy too, so that what is tested there is what a GPU holds."""
        for parameter, host in self._parameters:
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        for module, name, host in self._buffers:
            module._buffers[name] = host.to(self._device, non_blocking=True, copy=True)

    def leave(self) -> None:
        for parameter, host in self._parameters:
            parameter.data = host
        for module, name, host in self._buffers:
            module._buffers[name] = host

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._pinned is None else self._pinned.copy(tensor)


class Moved:
    """A quantised model, whose layers hold more than tensors: only their own `to` moves them whole."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        make_movable(model)
        self.leave()

    def arrive(self) -> None:
        self._model.to(self._device)

    def leave(self) -> None:
        self._model.to("cpu")


def open_guest(model: nn.Module, device: torch.device, *, is_pinned: bool) -> Guest:
    """As suits the model, which is in host memory afterwards."""
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    return Moved(model, device) if is_quantized else HostCopies(model, device, is_pinned=is_pinned)


def open_turn(config: StageConfig, device: torch.device, guests: Sequence[Guest]) -> Turn:
    """For the weights of one process, which are away at first."""
    assert config.on_demand is not None

    def arrive() -> None:
        for guest in guests:
            guest.arrive()
        accelerator.synchronize(device)  # so that the time is the copies'

    def leave() -> None:
        for guest in guests:
            guest.leave()
        accelerator.empty_cache(device)

    return Turn(_path(device), arrive=arrive, leave=leave, turn_s=config.on_demand.turn_s)


def turn_to_load(config: StageConfig, device: torch.device) -> AbstractContextManager[None]:
    """Weights are quantised on the GPU: with `on_demand`, by one stage at a time."""
    if config.on_demand is None or config.quantization is None:
        return nullcontext()
    return Turn(_path(device), leave=partial(accelerator.empty_cache, device)).work()


def _path(device: torch.device) -> Path:
    """The same for all processes of this user and node that use this very device, by whatever number."""
    name = f"gpu-{accelerator.device_uuid(device)}" if accelerator.is_accelerator(device) else "cpu"
    return Path(tempfile.gettempdir()) / f"latent-relay-{os.getuid()}" / name

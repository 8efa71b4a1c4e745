"""torch.jit.trace for UNets: one graph for each set of argument shapes, recorded at the first call with them."""

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning


def trace_unet(name: str, model: nn.Module) -> None:
    """Replaces the model's forward by traced graphs, in place. Raises ValueError if it is not a UNet."""
    if not type(model).__name__.startswith("UNet"):
        raise ValueError(f"trace is for UNets, and {name} is a {type(model).__name__}: use compile: blocks")
    model.requires_grad_(False)  # only if traced: without gradients torch chooses other convolution kernels
    model.forward = TracedForward(model)


class TracedForward:
    """Replaces a UNet's `forward`; returns what that returns with `return_dict=False`.

    A graph takes only positional tensors, so nested arguments are flattened before the call and rebuilt inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forward = model.forward
        self._graphs: dict[Hashable, Any] = {}

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor]:
        inputs.pop("return_dict", None)
        tensors: list[torch.Tensor] = []
        outline = _flatten(inputs, tensors)
        key = repr(outline), tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if key not in self._graphs:
            self._graphs[key] = self._record(outline, tensors)
        return (self._graphs[key](*tensors),)

    def _record(self, outline: Any, tensors: list[torch.Tensor]) -> Any:
        def run(*values: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self._forward(**_rebuild(outline, values), return_dict=False)[0]
            return output

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TracerWarning)  # about fixed sizes, which are part of the key
            return torch.jit.trace(run, tuple(tensors), check_trace=False)  # type: ignore[no-untyped-call]


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Returns the nest with a `_Place` for each tensor; appends the tensors to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {name: _flatten(entry, tensors) for name, entry in value.items()}
    return value


def _rebuild(outline: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    if isinstance(outline, _Place):
        return tensors[outline]
    if isinstance(outline, Mapping):
        return {name: _rebuild(entry, tensors) for name, entry in outline.items()}
    return outline


class _Place(int):
    """Index of a tensor in the flat list."""

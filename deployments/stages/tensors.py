"""Functions on the tensors in nests of tuples, lists, dicts and plain values, which pipelines pass around."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deployments.memory.working import META


@dataclass(frozen=True)
class Shape:
    """Replaces a tensor whose values are not needed, because Ray cannot send a tensor without values."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def map_tensors(change: Callable[[Any], Any], value: Any, of: type = torch.Tensor) -> Any:
    """Returns a copy of a nest with `change` applied to every tensor, or to every instance of `of`."""
    if isinstance(value, of):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, entry, of) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([map_tensors(change, entry, of) for entry in value])
    return value


def each_tensor(value: Any) -> Iterator[torch.Tensor]:
    """Yields all tensors of a nest."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from each_tensor(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from each_tensor(entry)


def lies_channels_last(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is channels-last, for which convolutions round differently.

    Convolutions treat it as channels-last only if its batch dimension has the largest stride, even of size 1.
    """
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and tensor.stride(0) == max(tensor.stride())
    )


def laid(tensor: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """Restores a channels-last layout, which is lost when a tensor is sent."""
    return tensor.contiguous(memory_format=torch.channels_last) if is_channels_last else tensor


def to_cpu(value: Any) -> Any:
    """Copies tensors to the CPU, contiguous, for another process."""
    return map_tensors(lambda tensor: tensor.cpu().contiguous(), value)


def to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Moves tensors to the device: floating point ones in this dtype, masks and ids in their own dtype.

    Tensors on the meta device stay there.
    """

    def move(one: torch.Tensor) -> torch.Tensor:
        return one.to(META if one.is_meta else device, dtype if one.is_floating_point() else one.dtype)

    return map_tensors(move, value)


def to_zeros(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Like `to_device`, but with zeros as the values."""

    def fill(one: torch.Tensor) -> torch.Tensor:
        return torch.zeros(one.shape, dtype=dtype if one.is_floating_point() else one.dtype, device=device)

    return map_tensors(fill, value)


def shapes_only(value: Any) -> Any:
    """Replaces floating point tensors by their shapes; keeps masks and ids."""
    return map_tensors(lambda one: Shape(tuple(one.shape), one.dtype) if one.is_floating_point() else one, value)


def without_shapes(value: Any) -> Any:
    """Replaces each Shape by a tensor on the meta device."""
    return map_tensors(lambda one: torch.empty(one.sizes, dtype=one.dtype, device=META), value, Shape)


def without_values(value: Any) -> Any:
    """Moves tensors to the meta device; floating point ones become float32, the dtype of a skeleton's weights."""
    return map_tensors(lambda one: one.to(META, torch.float32 if one.is_floating_point() else one.dtype), value)

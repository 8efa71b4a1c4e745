"""Tensors in what pipelines pass about: in tuples, lists and dicts, beside plain values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deployments.memory.working import META


@dataclass(frozen=True)
class Shape:
    """In place of a tensor whose values nobody needs: Ray sends none without."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def map_tensors(change: Callable[[Any], Any], value: Any, of: type = torch.Tensor) -> Any:
    """The same, with every tensor changed."""
    if isinstance(value, of):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, entry, of) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([map_tensors(change, entry, of) for entry in value])
    return value


def each_tensor(value: Any) -> Iterator[torch.Tensor]:
    """All of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from each_tensor(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from each_tensor(entry)


def lies_channels_last(tensor: torch.Tensor) -> bool:
    """As pictures do, and what convolutions make of them; they round otherwise than where channels come first.

    Convolutions take a picture for one such only where its batch has the largest stride, though it be of one.
    """
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and tensor.stride(0) == max(tensor.stride())
    )


def laid(tensor: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """As it lay before it was sent, which makes it contiguous."""
    return tensor.contiguous(memory_format=torch.channels_last) if is_channels_last else tensor


def to_cpu(value: Any) -> Any:
    """For another process."""
    return map_tensors(lambda tensor: tensor.cpu().contiguous(), value)


def to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Numbers in this dtype; masks and ids in their own. What has no values stays so."""

    def move(one: torch.Tensor) -> torch.Tensor:
        return one.to(META if one.is_meta else device, dtype if one.is_floating_point() else one.dtype)

    return map_tensors(move, value)


def to_zeros(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """As `to_device`, of tensors without values."""

    def fill(one: torch.Tensor) -> torch.Tensor:
        return torch.zeros(one.shape, dtype=dtype if one.is_floating_point() else one.dtype, device=device)

    return map_tensors(fill, value)


def shapes_only(value: Any) -> Any:
    """Of numbers the shapes; masks and ids as they are."""
    return map_tensors(lambda one: Shape(tuple(one.shape), one.dtype) if one.is_floating_point() else one, value)


def without_shapes(value: Any) -> Any:
    """Shapes as tensors again, on the meta device."""
    return map_tensors(lambda one: torch.empty(one.sizes, dtype=one.dtype, device=META), value, Shape)


def without_values(value: Any) -> Any:
    """Tensors on the meta device, in the dtype of a skeleton's weights."""
    return map_tensors(lambda one: one.to(META, torch.float32 if one.is_floating_point() else one.dtype), value)

"""A cache of constant tensors on the worker ranks, so that an input is sent only once while it exists on rank 0.

A pipeline passes the same embeddings, ids and masks at every step of a request. Rank 0 recognises a tensor by its
identity and sends it once, under a key. When the request ends and the tensor is freed, its key is released, and
the next micro-batch tells the other ranks to free their copies. Micro-batches keep their order around the ring, so
a key arrives before its first use and its release after the last. The cache need not know which inputs are
constant.
A micro-batch that fails on the way may have reached no rank, some or all. Its releases are therefore repeated with
a later micro-batch, and before it is sent again its tensors are forgotten, so that they are sent again too.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from deployments.engine.merge import Inputs


@dataclass(frozen=True, eq=False)
class CachedTensor:
    """Replaces a tensor: the key by which workers cache it, and the tensor itself the first time."""

    key: int
    tensor: torch.Tensor | None


@dataclass(frozen=True)
class ShapeOf:
    """Replaces a tensor of which later shards read only the shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class ConstantSender:
    """Rank 0's side: replaces tensors by keys. One thread calls `substitute`; any thread may free tensors."""

    def __init__(self) -> None:
        self._keys = count()
        self._cached: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._released: deque[int] = deque()

    def substitute(self, inputs: Inputs, shape_only: frozenset[str] = frozenset()) -> Inputs:
        """Returns the inputs with every tensor replaced by what the other ranks need of it.

        shape_only: names of inputs of which later shards do not need the values (`blocks.shape_only_inputs`).
        """
        return {
            name: tree_map_only(torch.Tensor, _shape_of if name in shape_only else self._cache, value)
            for name, value in inputs.items()
        }

    def take_released(self) -> tuple[int, ...]:
        """Returns the keys whose tensors were freed since the last call."""
        return tuple(self._released.popleft() for _ in range(len(self._released)))

    def release(self, keys: Iterable[int]) -> None:
        """Makes the next `take_released` return these keys. Any thread may call it."""
        self._released.extend(keys)

    def forget(self, inputs: Inputs) -> None:
        """Makes the next `substitute` send these tensors again, under new keys.

        Any thread may call it, while none of these tensors is being substituted.
        """
        tree_map_only(torch.Tensor, self._forget, dict(inputs))

    def _forget(self, tensor: torch.Tensor) -> None:
        cached: tuple[int, int] | None = self._cached.pop(tensor, None)  # type: ignore[no-untyped-call]
        if cached is not None:
            self.release(cached[:1])

    def _cache(self, tensor: torch.Tensor) -> CachedTensor:
        cached: tuple[int, int] | None = self._cached.get(tensor)  # type: ignore[no-untyped-call]
        if cached is not None and cached[1] == tensor._version:  # not written to since
            return CachedTensor(cached[0], None)
        key = next(self._keys)
        self._cached[tensor] = key, tensor._version
        weakref.finalize(tensor, self.release, (key,))
        return CachedTensor(key, tensor)


class ConstantCache:
    """A worker's side: replaces keys by the tensors that came with them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[int, torch.Tensor] = {}

    def resolve(self, substituted: Inputs) -> Inputs:
        """Returns the original inputs, on this rank's device."""
        return {name: tree_map(self._resolve, value) for name, value in substituted.items()}

    def release(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            self._tensors.pop(key, None)

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, ShapeOf):
            return torch.zeros(value.shape, dtype=value.dtype, device=self._device)
        if isinstance(value, CachedTensor):
            if value.tensor is not None:
                # Received tensors are views of one buffer per message: the copy lets the buffer be freed.
                self._tensors[value.key] = value.tensor.to(self._device, copy=True)
            return self._tensors[value.key]
        return value


def only_shapes(substituted: Inputs, resolved: Inputs, names: frozenset[str]) -> Inputs:
    """Returns `substituted` with only the shapes of the inputs in `names`, for ranks that need no values of them.

    resolved: what a ConstantCache made of `substituted`.
    """
    return {
        name: tree_map_only(torch.Tensor, _shape_of, resolved[name]) if name in names else value
        for name, value in substituted.items()
    }


def _shape_of(tensor: torch.Tensor) -> ShapeOf:
    return ShapeOf(tuple(tensor.shape), tensor.dtype)

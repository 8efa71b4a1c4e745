"""What of a forward's inputs must cross to the other ranks: each tensor once, as long as it lives on rank 0.

A pipeline passes the same embeddings, ids and masks at every step of a request. Rank 0 knows a tensor by its
identity and sends it once, under a key; when the request ends and the tensor is freed, so is its key, and the
next micro-batch tells the other ranks to let go of theirs. Micro-batches keep their order around the ring, so
a key arrives before its first use and its release after the last. Nothing here knows which inputs are constant.
A micro-batch that fails on the way may have reached no rank, some or all: the releases it had with it go with a
later one, and what flies once more is forgotten first, so that its tensors go with it again.
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
class Held:
    """In place of a tensor: the key the other ranks hold it by, and the tensor itself the first time."""

    key: int
    tensor: torch.Tensor | None


@dataclass(frozen=True)
class ShapeOf:
    """In place of a tensor that later shards read only for its shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Outliner:
    """Rank 0's side. One thread outlines; tensors may be freed in any."""

    def __init__(self) -> None:
        self._keys = count()
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._released: deque[int] = deque()

    def outline(self, inputs: Inputs, shape_only: frozenset[str] = frozenset()) -> Inputs:
        """The inputs with every tensor replaced by what the other ranks need of it.

        shape_only: names of inputs of which later shards need no values (`blocks.shape_only_inputs`).
        """
        return {
            name: tree_map_only(torch.Tensor, _shape_of if name in shape_only else self._hold, value)
            for name, value in inputs.items()
        }

    def take_released(self) -> tuple[int, ...]:
        """Keys whose tensors were freed since the last call."""
        return tuple(self._released.popleft() for _ in range(len(self._released)))

    def release(self, keys: Iterable[int]) -> None:
        """Let the next `take_released` return them. From any thread."""
        self._released.extend(keys)

    def forget(self, inputs: Inputs) -> None:
        """Send these tensors again, under other keys. From any thread, while none of them is outlined."""
        tree_map_only(torch.Tensor, self._forget, dict(inputs))

    def _forget(self, tensor: torch.Tensor) -> None:
        held: tuple[int, int] | None = self._held.pop(tensor, None)  # type: ignore[no-untyped-call]
        if held is not None:
            self.release(held[:1])

    def _hold(self, tensor: torch.Tensor) -> Held:
        held: tuple[int, int] | None = self._held.get(tensor)  # type: ignore[no-untyped-call]
        if held is not None and held[1] == tensor._version:  # nobody has written to it since
            return Held(held[0], None)
        key = next(self._keys)
        self._held[tensor] = key, tensor._version
        weakref.finalize(tensor, self.release, (key,))
        return Held(key, tensor)


class Holder:
    """Another rank's side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[int, torch.Tensor] = {}

    def fill(self, outlined: Inputs) -> Inputs:
        """The inputs again, on this rank's device."""
        return {name: tree_map(self._fill, value) for name, value in outlined.items()}

    def release(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            self._tensors.pop(key, None)

    def _fill(self, value: Any) -> Any:
        if isinstance(value, ShapeOf):
            return torch.zeros(value.shape, dtype=value.dtype, device=self._device)
        if isinstance(value, Held):
            if value.tensor is not None:
                # Received tensors are views of one buffer per message: a copy lets the rest of it go.
                self._tensors[value.key] = value.tensor.to(self._device, copy=True)
            return self._tensors[value.key]
        return value


def only_shapes(outlined: Inputs, filled: Inputs, names: frozenset[str]) -> Inputs:
    """The same for ranks that need no values of these names. filled: what a Holder has made of them."""
    return {
        name: tree_map_only(torch.Tensor, _shape_of, filled[name]) if name in names else value
        for name, value in outlined.items()
    }


def _shape_of(tensor: torch.Tensor) -> ShapeOf:
    return ShapeOf(tuple(tensor.shape), tensor.dtype)

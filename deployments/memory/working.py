"""Working memory: the most bytes of tensors besides weights during one call, counted in a call on the meta device.

Source: the model's own forward. Every tensor that an operation makes counts until it is released, as on a GPU;
only attention is assumed to be fused, without [heads, S, S] scores. Kernels' own workspaces and the allocator's
rounding are not counted.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")


def working_bytes(model: nn.Module, call: Callable[[], Any]) -> int:
    """Returns the working memory of `call()`, which runs `model` on the meta device."""
    with on_meta() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.hold(tensor)
        before: int = live.peak_bytes
        call()
        most: int = live.peak_bytes
    return most - before


@contextmanager
def on_meta() -> "Iterator[_LiveTensors]":
    """Context for fast calls on the meta device; yields the counter of live tensors."""
    with torch.no_grad(), _FusedAttention(), _LiveTensors() as live:
        yield live


def to_meta(value: Any) -> Any:
    """Returns the same nest with its tensors on the meta device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), value)


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages, each from its first use until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self._live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._outputs: dict[Hashable, _Layout] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = self._output(func, args, kwargs or {})
        for value in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(value, torch.Tensor):
                self.hold(value)
        return output

    def _output(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the output of one operation. Layouts of new tensors are cached by operation and arguments: most
        of the meta device's operations are Python, and a VAE repeats the same ones thousands of times for a
        video."""
        if not _makes_one_tensor(func):
            return func(*args, **kwargs)
        key = func, _described(args), _described(tuple(kwargs.items()))
        if key in self._outputs:
            return self._outputs[key].empty()
        output = func(*args, **kwargs)
        self._outputs[key] = _Layout.of(output)
        return output

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._live_bytes -= self._sizes.pop(key)


class _Layout(NamedTuple):
    """A tensor's layout; a tensor on the meta device has nothing else."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@cache
def _makes_one_tensor(func: Any) -> bool:
    """Whether the operation returns one new tensor: not a view, and not a tensor that it writes to."""
    returns = func._schema.returns
    is_new = len(returns) == 1 and str(returns[0].type) == "Tensor" and returns[0].alias_info is None
    return is_new and not func._schema.is_mutable


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return _Layout.of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value  # 2 == 2.0 == True, but they can give results of different dtypes


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by one fused operation, as on a GPU. On the meta device torch would compute scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return named["query"].new_empty((*named["query"].shape[:-1], named["value"].shape[-1]))
        return func(*args, **(kwargs or {}))

"""Keeps both passes of classifier-free guidance in flight at once, with diffusers' unmodified pipelines.

A pipeline calls the denoiser for the conditional prediction, then for the unconditional one, and computes with the
first only when it has the second. So each call returns a `Pending` at once: over S shards a lone guided request
takes S + 1 slots a step instead of 2·S.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from deployments.engine.merge import Inputs

Begin = Callable[[int, str, Inputs], Callable[[], Any]]
"""(lowest slot that no unread prediction uses, component, inputs) -> function that waits for the prediction."""


class Pending(torch.Tensor):
    """A prediction in flight. Computing with it waits for it; slicing it, as edit pipelines do, does not."""

    _read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, read: Callable[[], torch.Tensor]) -> "Pending":
        """read: waits for the tensor; called once."""
        pending: Pending = torch.empty(0).as_subclass(cls)
        pending._read = _Answer(read)
        return pending

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], cls):
            whole, index = args
            return cls.of(lambda: whole._read()[index])
        args, kwargs = waited_for((args, kwargs or {}))
        return func(*args, **kwargs)


class _Answer:
    """Calls `read` once, and repeats what it returned or raised as often as it is called itself."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read: Callable[[], torch.Tensor] | None = read
        self._tensor: torch.Tensor | None = None
        self._error: BaseException | None = None

    def __call__(self) -> torch.Tensor:
        if (read := self._read) is not None:
            self._read = None
            try:
                self._tensor = read()
            except BaseException as error:
                # A copy: the error's traceback keeps every frame of the call alive, and this object is in them.
                self._error = copy.copy(error)
                raise
        if self._error is not None:
            raise copy.copy(self._error)
        assert self._tensor is not None
        return self._tensor


def waited_for(value: Any) -> Any:
    """Replaces pending predictions by their tensors, in tuples, lists and dicts."""
    return tree_map_only(Pending, lambda pending: pending._read(), value)


class Passes:
    """One request's forwards of its denoisers. Not thread-safe: a request has one thread."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._unread: set[int] = set()

    @property
    def num_unread(self) -> int:
        """Number of predictions that the pipeline has requested and not used yet."""
        return len(self._unread)

    def __call__(self, component: str, inputs: Inputs) -> tuple[Pending]:
        """Called like a model that returns one tensor without `return_dict`."""
        slot = next(number for number in range(len(self._unread) + 1) if number not in self._unread)
        wait = self._begin(slot, component, inputs)
        self._unread.add(slot)

        def read() -> torch.Tensor:
            self._unread.discard(slot)
            [prediction] = wait()
            if not isinstance(prediction, torch.Tensor):
                raise ValueError(f"{component} returns {type(prediction).__name__}, not a tensor")
            return prediction

        return (Pending.of(read),)

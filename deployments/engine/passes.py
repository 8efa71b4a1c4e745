"""Both passes of classifier-free guidance under way at once, under diffusers' unmodified pipelines.

A pipeline asks for the conditional prediction, then for the unconditional one, and computes with the first only
when it has the second. So it gets each as a `Pending`: over S shards a lone guided request takes S + 1 slots a
step instead of 2·S.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from deployments.engine.merge import Inputs

Begin = Callable[[int, str, Inputs], Callable[[], Any]]
"""(a place that no unread prediction has, the least, component, inputs) -> waits for what the model returns."""


class Pending(torch.Tensor):
    """A prediction under way. Who first computes with it waits; slices, which edit pipelines take, do not."""

    _read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, read: Callable[[], torch.Tensor]) -> "Pending":
        """read: waits for the tensor; is called once."""
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
    """What `read` returned or raised, as often as it is asked for."""

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
                # A copy: through its traceback the error would keep every frame of the call, and this in them.
                self._error = copy.copy(error)
                raise
        if self._error is not None:
            raise copy.copy(self._error)
        assert self._tensor is not None
        return self._tensor


def waited_for(value: Any) -> Any:
    """The same, with the tensors themselves in place of predictions under way, in tuples, lists and dicts."""
    return tree_map_only(Pending, lambda pending: pending._read(), value)


class Passes:
    """One request's forwards of its denoisers. Not thread-safe: a request has one thread."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._unread: set[int] = set()

    @property
    def num_unread(self) -> int:
        """Predictions that the pipeline has asked for and not used."""
        return len(self._unread)

    def __call__(self, component: str, inputs: Inputs) -> tuple[Pending]:
        """As a model that returns one tensor does without `return_dict`."""
        place = next(number for number in range(len(self._unread) + 1) if number not in self._unread)
        wait = self._begin(place, component, inputs)
        self._unread.add(place)

        def read() -> torch.Tensor:
            self._unread.discard(place)
            [prediction] = wait()
            if not isinstance(prediction, torch.Tensor):
                raise ValueError(f"{component} returns {type(prediction).__name__}, not a tensor")
            return prediction

        return (Pending.of(read),)

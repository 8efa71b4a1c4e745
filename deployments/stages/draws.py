"""Noise that a scheduler draws without being given a generator: the request's own, not the process's."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from cluster import accelerator

Args = ParamSpec("Args")
Answer = TypeVar("Answer")

_TURN = threading.Lock()
"""The default generators are the process's: one request at a time has them in its own state."""


class Draws:
    """One request's, as if `torch.manual_seed(seed)` had been called for it alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator, *accelerator.default_generators(device)]
        self._fresh = [torch.Generator(of.device).manual_seed(seed).get_state() for of in self._generators]
        self._states = self._fresh

    @property
    def were_taken(self) -> bool:
        """Whether anything was drawn so far."""
        return not all(map(torch.equal, self._fresh, self._states))

    def within(self, call: Callable[Args, Answer]) -> Callable[Args, Answer]:
        """The same call, its draws from this request's state on; pipelines may look at its signature."""

        @functools.wraps(call)
        def wrapped(*args: Args.args, **kwargs: Args.kwargs) -> Answer:
            with self._turn():
                return call(*args, **kwargs)

        return wrapped

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with _TURN:
            before = [of.get_state() for of in self._generators]
            self._set(self._states)
            try:
                yield
            finally:
                self._states = [of.get_state() for of in self._generators]
                self._set(before)

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

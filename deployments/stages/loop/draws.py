"""Random state for schedulers that draw noise without a generator: each request has its own, not the process's."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from cluster.machines import accelerator

Args = ParamSpec("Args")
Answer = TypeVar("Answer")

_TURN = threading.Lock()
"""Held while the process's default generators are in one request's state."""


class Draws:
    """One request's random state, as if `torch.manual_seed(seed)` had been called for this request alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator, *accelerator.default_generators(device)]
        self._fresh = [torch.Generator(of.device).manual_seed(seed).get_state() for of in self._generators]
        self._states = self._fresh

    @property
    def were_taken(self) -> bool:
        """Whether anything was drawn so far."""
        return not all(map(torch.equal, self._fresh, self._states))

    def within(self, call: Callable[Args, Answer]) -> Callable[Args, Answer]:
        """Makes a call draw from this request's state. Keeps its signature, which pipelines may read."""

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

"""Stubs that replace another stage's models in a pipeline: the model's config and methods, without weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

from deployments.engine.denoiser_stand_in import attribute


class Reached(BaseException):
    """Ends a pipeline's call where another stage's work begins.

    Derives from BaseException, so that nothing on the way handles it as an error.
    """


def reach(*_: Any, **__: Any) -> NoReturn:
    """Raises Reached, whatever its arguments, so that it can replace any method."""
    raise Reached


class ModelStub:
    """Replaces a model: its forward and its decode end the call. To `isinstance` it is of the model's class."""

    def __init__(
        self, face: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            face: an instance of the model's class with its config, perhaps without modules.
            build: builds the model on the meta device, for pipelines that read its modules (SDXL's
                `unet.add_embedding`).
            dtype: the model's dtype in the other stage, as far as this pipeline needs to know it.
            device: where this stage computes, because pipelines take their device from their first model.
        """
        self._face, self._build = face, build
        self.dtype, self.device = dtype, device
        # accelerate's hook, from which pipelines read where to compute while their models' weights are elsewhere.
        self._hf_hook = SimpleNamespace(execution_device=device)

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        return type(self._face)

    def modules(self) -> Iterator["ModelStub"]:
        """Yields only the stub itself: it has no submodules."""
        yield self

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device. The first access is not thread-safe."""
        return self._build()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return attribute(self._face, name)
        except AttributeError:
            return getattr(self.skeleton, name)

    @contextmanager
    def cache_context(self, _name: str, **_: Any) -> Iterator[None]:
        """Does nothing: pipelines use it to name a denoiser's guidance passes."""
        yield

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        reach()

    def decode(self, *_: Any, **__: Any) -> NoReturn:
        """A VAE's decode: ends the call."""
        reach()

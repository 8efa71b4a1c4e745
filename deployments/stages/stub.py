"""What a pipeline finds in place of a model that another stage has: its config and its methods, and no weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

from deployments.engine.stand_in import attribute


class Reached(BaseException):
    """Ends a pipeline's call where another stage's work begins.

    No `Exception`, so that nothing on the way takes it for a fault.
    """


def reach(*_: Any, **__: Any) -> NoReturn:
    """Raises Reached, in place of whatever is called so."""
    raise Reached


class ModelStub:
    """Its forward and its decode end the call. To pipelines that ask `isinstance` it is of the model's class."""

    def __init__(
        self, face: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            face: of the model's class, with its config, perhaps without modules.
            build: the model on the meta device, for pipelines that look into it (SDXL's `unet.add_embedding`).
            dtype: what the other stage has it in, as far as this pipeline is to know.
            device: where this stage computes, for pipelines take their own from the first model that they have.
        """
        self._face, self._build = face, build
        self.dtype, self.device = dtype, device
        # accelerate's, by which pipelines are told where to compute while their models' weights are elsewhere.
        self._hf_hook = SimpleNamespace(execution_device=device)

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        return type(self._face)

    def modules(self) -> Iterator["ModelStub"]:
        """Nothing lies behind it."""
        yield self

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device. The first time, not thread-safe."""
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
        """Of a denoiser's guidance passes."""
        yield

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        reach()

    def decode(self, *_: Any, **__: Any) -> NoReturn:
        """Of a VAE."""
        reach()

"""What a pipeline finds in place of a model that another stage has: its config and its methods, and no weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn


class Reached(BaseException):
    """Ends a pipeline's call where another stage's work begins.

    No `Exception`, so that nothing on the way takes it for a fault.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs
        """Of the other stage's model."""


def reach(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises Reached with these arguments."""
    raise Reached(args, kwargs)


class ModelStub:
    """Its forward and its decode end the call.

    No `nn.Module`, for pipelines take their device from those that they have.
    """

    def __init__(self, face: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
        """
        Args:
            face: of the model's class, with its config, perhaps without modules.
            build: the model on the meta device, for pipelines that look into it (SDXL's `unet.add_embedding`).
            dtype: what the other stage has it in, as far as this pipeline is to know.
        """
        self._face, self._build = face, build
        self.dtype, self.device = dtype, torch.device("cpu")

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device. The first time, not thread-safe."""
        return self._build()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_face":
            raise AttributeError(name)
        try:
            return getattr(self._face, name)
        except AttributeError:
            return getattr(self.skeleton, name)

    @contextmanager
    def cache_context(self, _name: str, **_: Any) -> Iterator[None]:
        """Of a denoiser's guidance passes."""
        yield

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        reach(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of a VAE."""
        reach(*args, **kwargs)

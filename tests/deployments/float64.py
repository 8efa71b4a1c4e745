"""Plain diffusers in float64, the reference for the rounding errors of float32."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models import embeddings
from torch.overrides import TorchFunctionMode

from tests.deployments.plain import load_plain

WIDER: Mapping[Any, torch.dtype] = {torch.float32: torch.float64, torch.complex64: torch.complex128}
DRAWS = frozenset({torch.randn, torch.rand})


class _Widened(TorchFunctionMode):
    """Replaces float32 by float64 in every call: models compute rotary embeddings and norms in float32, whatever
    their dtype.

    Random numbers are still drawn in float32, because draws in float64 would give another image.
    """

    is_off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_off or func is torch.Tensor.view:  # reads weights' bytes as another dtype
            return func(*args, **kwargs)
        if func in DRAWS:
            return func(*args, **kwargs | {"dtype": torch.float32}).double()
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_wider, args), **{name: _wider(value) for name, value in kwargs.items()})


def _wider(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Context in which torch computes in float64 in this thread, except for the sines and cosines of timesteps.

    These are inputs, the same in float32 whatever the model's dtype: their angles, of up to 1000, are off by 3e-5,
    far more than what is computed with them.
    """
    widened, embed, from_numpy = _Widened(), embeddings.get_timestep_embedding, torch.from_numpy

    def embed_in_float32(timesteps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        widened.is_off = True
        try:
            return embed(timesteps.to(torch.float32), *args, **kwargs).double()
        finally:
            widened.is_off = False

    def wider_from_numpy(array: Any) -> torch.Tensor:
        """Widens a schedule's noise levels."""
        made = from_numpy(array)
        return made.double() if made.is_floating_point() else made

    torch.set_default_dtype(torch.float64)
    try:
        with (
            widened,
            patch.object(embeddings, "get_timestep_embedding", embed_in_float32),
            patch.object(torch, "from_numpy", wider_from_numpy),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def load_float64(folder: Path) -> Any:
    """Returns a pipeline in float64, with weights of float32, which float64 holds exactly.

    Its schedule is computed in float32, as in a pipeline of any dtype. Call the pipeline in `in_float64`, too.
    """
    with in_float64(), warnings.catch_warnings(action="ignore"):
        pipeline = load_plain(folder).to(torch.float64)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return pipeline

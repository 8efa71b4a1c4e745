"""Records the forwards of a tiny pipeline's denoisers in plain diffusers: their inputs and outputs."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from deployments.checkpoints.source import fetch_checkpoint
from tests.deployments.plain import load_plain
from tests.deployments.tiny_calls import TINY_CALLS

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")


@dataclass(frozen=True, eq=False)
class Recorded:
    """One forward of one denoiser."""

    component: str
    model: Any
    inputs: Mapping[str, Any]
    """Arguments by name, as `Shard` and `Merger` take them."""
    output: tuple[Any, ...]

    @property
    def layout(self) -> str:
        """A key that is equal for forwards that differ only in values."""
        return f"{self.component} {tree_map_only(torch.Tensor, lambda tensor: tensor.shape, dict(self.inputs))}"


@cache
def load_tiny(name: str) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return load_plain(fetch_checkpoint(f"tiny://{name}", ()))


def record(name: str, prompt: str = "a red fox", *, seed: int = 0, **changes: Any) -> list[Recorded]:
    """Returns every forward of one call, in order."""
    pipeline = load_tiny(name)
    forwards: list[Recorded] = []
    with _hooks(pipeline, forwards), warnings.catch_warnings(action="ignore"):
        pipeline(prompt=prompt, **TINY_CALLS[name] | changes, generator=torch.Generator().manual_seed(seed))
    return forwards


@contextmanager
def _hooks(pipeline: Any, forwards: list[Recorded]) -> Iterator[None]:
    models = {part: pipeline.components.get(part) for part in DENOISERS}
    handles = [
        model.register_forward_hook(_hook(part, forwards), with_kwargs=True)
        for part, model in models.items()
        if model is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(component: str, forwards: list[Recorded]) -> Any:
    def record_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        del inputs["self"]
        inputs.pop("return_dict", None)
        inputs |= inputs.pop("kwargs", {})
        parts = _parts(output)
        forwards.append(Recorded(component, model, tree_map_only(torch.Tensor, torch.clone, inputs), parts))

    return record_forward


def _parts(output: Any) -> tuple[Any, ...]:
    """Returns the output as a tuple, as `return_dict=False` does."""
    if isinstance(output, torch.Tensor):
        return (output,)
    return tuple(output.values() if isinstance(output, Mapping) else output)

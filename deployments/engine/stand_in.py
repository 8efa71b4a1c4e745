"""What a diffusers pipeline finds where its denoisers should be: a model's face, without its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

Inputs = Mapping[str, Any]
"""Keyword arguments of the denoiser's forward: tensors, or nested dicts and lists of them, and flags."""


Submit = Callable[[str, Inputs], Any]
"""(component, inputs) -> what that denoiser's forward returns without `return_dict`."""


def stand_ins(
    skeletons: Mapping[str, nn.Module], *, dtype: torch.dtype, device: torch.device, submit: Submit
) -> dict[str, "StandIn"]:
    """For all of a checkpoint's denoisers, by component name."""
    return {
        name: StandIn(skeleton, dtype=dtype, device=device, submit=partial(submit, name))
        for name, skeleton in skeletons.items()
    }


class StandIn(nn.Module):
    """Config, dtype and device of the real model; `forward` hands the call to `submit` and waits."""

    def __init__(
        self,
        skeleton: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        submit: Callable[[Inputs], Any],
    ) -> None:
        """
        Args:
            skeleton: the same model on the meta device, for what pipelines ask of its submodules.
            submit: returns what the model's forward does without `return_dict`.
        """
        super().__init__()
        self._dtype, self._device, self._submit = dtype, device, submit
        self.__dict__["skeleton"] = skeleton  # past nn.Module, which would list its meta parameters as ours

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """For pipelines that ask `isinstance`."""
        return type(self.__dict__["skeleton"])

    def __getattr__(self, name: str) -> Any:
        """Whatever else a pipeline probes (`config`, SDXL's `add_embedding`), from the skeleton."""
        return attribute(self.__dict__["skeleton"], name)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Pipelines name their guidance passes by it; here every forward stands for itself."""
        yield

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """With the signature of the model's, from which some pipelines read what to give it."""
        model_class: Any = type(self.__dict__["skeleton"])

        @wraps(model_class.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = dict(zip(_names(model_class), args, strict=False)) | kwargs
            wants_names = inputs.pop("return_dict", True)
            output = self._submit(inputs)
            return Transformer2DModelOutput(sample=output[0]) if wants_names and len(output) == 1 else output

        return forward


def attribute(model: nn.Module, name: str) -> Any:
    """`model.name`; a setting by its config, for pipelines that ask the model, which diffusers warns of."""
    if name in vars(model) or hasattr(type(model), name):
        return getattr(model, name)
    try:
        return nn.Module.__getattr__(model, name)
    except AttributeError:
        config: Any = model.config
        if name in config:
            return config[name]
        raise


@cache
def _names(model_class: Any) -> tuple[str, ...]:
    """Of its forward's inputs, some of which pipelines pass by position."""
    return tuple(signature(model_class.forward).parameters)[1:]

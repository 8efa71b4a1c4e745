"""Stand-ins for a pipeline's denoisers: a model's interface without its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from deployments.engine.merge import Inputs

Submit = Callable[[str, Inputs], Any]
"""(component, inputs) -> what the denoiser's forward returns without `return_dict`."""


def denoiser_stand_ins(
    skeletons: Mapping[str, nn.Module], *, dtype: torch.dtype, device: torch.device, submit: Submit
) -> dict[str, "DenoiserStandIn"]:
    """Returns a stand-in for each denoiser of a checkpoint, by component name."""
    return {
        name: DenoiserStandIn(skeleton, dtype=dtype, device=device, submit=partial(submit, name))
        for name, skeleton in skeletons.items()
    }


class DenoiserStandIn(nn.Module):
    """Has the config, dtype and device of the real model; `forward` passes the call to `submit` and waits."""

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
            skeleton: the same model on the meta device, for pipelines that read attributes of its submodules.
            submit: returns what the model's forward returns without `return_dict`.
        """
        super().__init__()
        self._dtype, self._device, self._submit = dtype, device, submit
        self.__dict__["skeleton"] = skeleton  # bypasses nn.Module, which would list its meta parameters

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """The model's class, for `isinstance` checks in pipelines."""
        return type(self.__dict__["skeleton"])

    def __getattr__(self, name: str) -> Any:
        """Other attributes (`config`, SDXL's `add_embedding`) come from the skeleton."""
        return attribute(self.__dict__["skeleton"], name)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Does nothing: pipelines use it to name their guidance passes, and the names are not needed here."""
        yield

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """A forward with the model's signature, which some pipelines inspect."""
        model_class: Any = type(self.__dict__["skeleton"])

        @wraps(model_class.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = dict(zip(forward_input_names(model_class), args, strict=False)) | kwargs
            wants_names = inputs.pop("return_dict", True)
            output = self._submit(inputs)
            return Transformer2DModelOutput(sample=output[0]) if wants_names and len(output) == 1 else output

        return forward


def attribute(model: nn.Module, name: str) -> Any:
    """Returns `model.name`; reads settings from the config, since diffusers warns if a model is asked for one."""
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
def forward_input_names(model_class: Any) -> tuple[str, ...]:
    """Returns the names of a forward's inputs in order, because pipelines pass some by position."""
    return tuple(signature(model_class.forward).parameters)[1:]

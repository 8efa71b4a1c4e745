"""Forwards and decodes that compute nothing: the model's own code gives the shapes, on the meta device."""

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deployments.answers import DecodeArguments
from deployments.engine.merge import RULES, Inputs, latents_of
from deployments.memory.working import META
from deployments.request import MediaSize
from deployments.stages.tensors import each_tensor, map_tensors, without_values

_NOT_ITS_SIZE = ("must match", "to broadcast a dimension")
"""Parts of torch's error messages for sizes that the model takes on no device, such as more frames than it has
positions for."""


class Zeros:
    """Returns zeros for the forwards of a checkpoint's denoisers."""

    def __init__(self, skeletons: Mapping[str, nn.Module]) -> None:
        """skeletons: the models on the meta device, by component name."""
        self._zeros = {name: _Zeros(skeleton) for name, skeleton in skeletons.items()}

    def __call__(self, component: str, inputs: Inputs) -> Any:
        """Returns zeros in the shape of the prediction. Thread-safe."""
        return self._zeros[component](inputs)


class _Zeros:
    """Returns zeros for the forwards of one denoiser."""

    def __init__(self, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        self._shapes: dict[Hashable, Any] = {}
        config: Any = skeleton.config
        has_channels = config.get("out_channels") in (None, config.get("in_channels"))
        self._predicts_its_input = type(skeleton).__name__ in RULES and has_channels

    def __call__(self, inputs: Inputs) -> Any:
        if self._predicts_its_input:
            self._check_patches(inputs)
            return (map_tensors(torch.zeros_like, latents_of(inputs)),)
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in each_tensor(dict(inputs)))
        if key not in self._shapes:
            model: Any = copy.deepcopy(self._skeleton).to(META)
            try:
                with torch.no_grad():
                    self._shapes[key] = model(**without_values(dict(inputs)), return_dict=False)
            except (NotImplementedError, RuntimeError) as error:  # it reads values, or needs a real device
                if any(words in str(error) for words in _NOT_ITS_SIZE):
                    raise
                self._check_patches(inputs)
                self._shapes[key] = (map_tensors(self._as_predicted, latents_of(inputs)),)
        like = next(tensor for tensor in each_tensor(dict(inputs)) if tensor.is_floating_point())
        return map_tensors(lambda made: like.new_zeros(made.shape), self._shapes[key])

    def _check_patches(self, inputs: Inputs) -> None:
        """Raises ValueError if the model, which is not run, could not cut the latents into its patches."""
        config: Any = self._skeleton.config
        patch = config.get("patch_size") or 1
        height, width = patch[-2:] if isinstance(patch, Sequence) else (patch, patch)
        for latents in each_tensor(latents_of(inputs)):
            if latents.ndim > 3 and (latents.shape[-2] % height or latents.shape[-1] % width):
                raise ValueError(
                    f"latents of {list(latents.shape)} cannot be cut into patches of {height}x{width}"
                )

    def _as_predicted(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns a meta tensor like the latents, with the config's number of output channels if it gives one."""
        config: Any = self._skeleton.config
        shape, given, made = list(latents.shape), config.get("in_channels"), config.get("out_channels")
        if made is not None and latents.ndim > 3 and given in shape[1:3]:
            shape[shape.index(given, 1)] = made
        return latents.new_empty(shape, device=META)


def decoded_size(vae: Any, arguments: DecodeArguments) -> MediaSize:
    """Returns the size of what a VAE, or a stub of one, would make. Raises what the VAE raises."""
    model = copy.deepcopy(vae.skeleton).to(META)
    args, kwargs = without_values((arguments.args, dict(arguments.kwargs)))
    with torch.no_grad():
        made: torch.Tensor = model.decode(*args, **kwargs, return_dict=False)[0]
    num_frames = made.shape[2] if made.ndim == 5 else sum(len(call.latents) for call in arguments.calls)
    return MediaSize(made.shape[-1], made.shape[-2], num_frames)

"""Posteriors of input images: recorded in the decode stage, and replayed in the denoise stage.

The distribution's parameters are sent, not a sample: the request's own generator samples it where noise is drawn,
in the pipeline's order.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from deployments.answers import Posterior, Posteriors
from deployments.memory.working import META
from deployments.stages.tensors import laid, lies_channels_last, map_tensors

CPU = torch.device("cpu")
Encode = Callable[..., Any]
"""A function that is called like `vae.encode`."""


class ChangedVae:
    """A VAE, or a stub of one, with some methods replaced. No pipeline can change its device or dtype."""

    def __init__(self, vae: Any, **methods: Callable[..., Any]) -> None:
        self._vae = vae
        vars(self).update(methods)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._vae.__class__

    def to(self, *_: Any, **__: Any) -> "ChangedVae":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_vae":
            raise AttributeError(name)
        return getattr(self._vae, name)


def kept(output: Any, device: torch.device = CPU) -> Posterior:
    """Returns the posterior in what `vae.encode` returned, as a tuple or not."""
    output = output[0] if isinstance(output, tuple) else output
    output = getattr(output, "latent_dist", output)
    if isinstance(output, DiagonalGaussianDistribution):
        tensor = output.parameters
        return "parameters", tensor.to(device).contiguous(), lies_channels_last(tensor)
    tensor = next((getattr(output, name) for name in ("latent", "latents") if hasattr(output, name)), output)
    return "latent", tensor.to(device).contiguous(), lies_channels_last(tensor)


def given(posterior: Posterior, device: torch.device, *, return_dict: bool = True) -> Any:
    """Returns what `vae.encode` had returned for this posterior, on the device."""
    kind, tensor, is_channels_last = posterior
    tensor = laid(tensor.to(device), is_channels_last)
    if kind == "parameters":
        distribution = DiagonalGaussianDistribution(tensor)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)
    return EncoderOutput(latent=tensor) if return_dict else (tensor,)


def replay(posteriors: Posteriors, device: torch.device) -> Encode:
    """Returns a `vae.encode` that replays these posteriors, one per call, on the device."""
    left = deque(posteriors)

    def encode(*_: Any, return_dict: bool = True, **__: Any) -> Any:
        if not left:
            raise RuntimeError("the pipeline encodes more images than the decode stage has prepared")
        return given(left.popleft(), device, return_dict=return_dict)

    return encode


def blank(vae: Any) -> Encode:
    """Returns a `vae.encode` that returns zeros, in the shapes of the VAE on the meta device. vae: a stub."""

    def encode(pixels: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        model = copy.deepcopy(vae.skeleton).to(META)
        with torch.no_grad():
            output = model.encode(pixels.to(META, torch.float32), *args, **kwargs)
        zeros = map_tensors(lambda made: torch.zeros(made.shape, dtype=pixels.dtype), kept(output, META))
        return given(zeros, pixels.device, return_dict=return_dict)

    return encode

"""Choice of a model's kernels: the attention backend, and the memory format of convolutions."""

from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn


def set_attention_backend(name: str, model: Any, backend: str) -> None:
    """Sets the backend, by diffusers' name for it.

    Raises ValueError if the model has no choice of backend, or the backend's package is missing.
    """
    if not isinstance(model, ModelMixin):
        raise ValueError(f"attention_backend is for diffusers' models, and {name} is a {type(model).__name__}")
    try:
        model.set_attention_backend(backend)
    except RuntimeError as error:  # names the missing package
        raise ValueError(f"attention_backend {backend!r} cannot run here: {error}") from error
    processors = [getattr(module, "processor", None) for module in model.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"attention_backend: {type(model).__name__} always uses torch's native attention: leave it out"
        )


def set_channels_last(name: str, model: nn.Module) -> None:
    """Makes the weights of all convolutions channels_last. Raises ValueError if the model has no convolution."""
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    found = [
        (module, to) for kind, to in formats.items() for module in model.modules() if isinstance(module, kind)
    ]
    if not found:
        raise ValueError(f"channels_last is for convolutions, and {name} ({type(model).__name__}) has none")
    for convolution, memory_format in found:
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=memory_format)

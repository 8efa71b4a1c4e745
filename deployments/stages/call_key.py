"""Which calls return the same: the key of what a stage keeps."""

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from PIL import Image


def call_key(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls that return equal values. What is neither plain nor a picture is equal to nothing."""
    return name, _plain(args), _plain(kwargs)


def _plain(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((key, _plain(entry)) for key, entry in value.items()))
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, str | int | float | bool | torch.device | torch.dtype):
        return value
    if isinstance(value, Image.Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, torch.Tensor):
        there = value.detach().cpu().contiguous()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(there.view(torch.uint8).numpy().data).digest()
    return object()

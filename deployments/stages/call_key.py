"""Keys of a stage's cached results, equal for calls that return the same."""

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from PIL import Image


def call_key(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Returns a key that is equal for calls that return equal values.

    An argument that is no plain value, image or tensor makes the key unequal to all others.
    """
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

"""Files of a journal, one for each part, in safetensors, so that reading a file cannot run code from it."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from deployments.answers import JournalPart
from deployments.media.target_file import write_file
from deployments.options.resume import PART_SUFFIX

log = logging.getLogger("ray.serve")

_ABOUT = "about"
"""Name of the entry with everything but the tensors: JSON as bytes."""


def write_part(url: str, part: JournalPart) -> None:
    """Writes a part. If that fails, logs it, and the request goes on. url: prefix of the URLs of all parts."""
    try:
        if not write_file(f"{url}-{part.number:05d}{PART_SUFFIX}", pack(part)):
            log.warning("steps are not kept: the folder of %s is not on this machine", url)
    except Exception as error:  # object stores may raise anything
        log.warning("steps are not kept in %s: %s: %s", url, type(error).__name__, error)


def read_journal(url: str) -> tuple[JournalPart, ...]:
    """Returns all parts, in order, up to the first that cannot be read."""
    parts: list[JournalPart] = []
    try:
        files, path = url_to_fs(url, use_listings_cache=False)
        names = sorted(files.glob(f"{path}-*{PART_SUFFIX}"))
        parts.extend(unpack(files.cat_file(name)) for name in names)
    except Exception as error:  # as above
        log.warning("of the steps kept in %s, only %d parts can be read: %s", url, len(parts), error)
    return tuple(parts)


def pack(part: JournalPart) -> bytes:
    leaves, tree = tree_flatten(part.forwards)
    tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    about = {
        **{name: value for name, value in vars(part).items() if name != "forwards"},
        "tree": treespec_dumps(tree),
        "plain": [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        "axes": {name: _axes(tensor) for name, tensor in tensors.items()},
    }
    laid = {name: tensor.permute(_axes(tensor)).contiguous() for name, tensor in tensors.items()}
    return save(laid | {_ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)})


def unpack(data: bytes) -> JournalPart:
    """Returns the part in a file's bytes. Raises ValueError if they are no such file, or not a whole one."""
    try:
        tensors: Mapping[str, torch.Tensor] = load(data)
        about: dict[str, Any] = json.loads(tensors[_ABOUT].numpy().tobytes())
        leaves = about.pop("plain")
        for name, axes in about.pop("axes").items():
            leaves[int(name)] = tensors[name].permute([axes.index(axis) for axis in range(len(axes))])
        tree = treespec_loads(about.pop("tree"))
        return JournalPart(**about, forwards=tree_unflatten(leaves, tree))
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"not a part of a journal: {error}") from error


def _axes(tensor: torch.Tensor) -> list[int]:
    """Returns the axes from the outermost in memory to the innermost.

    The memory layout is kept because later operations round differently for another one.
    """
    return sorted(range(tensor.ndim), key=lambda axis: tensor.stride()[axis], reverse=True)

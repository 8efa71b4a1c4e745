"""Writes a model's random weights without ever holding the whole model: layer by layer, file by file."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

PART_BYTES = 2**31
"""Size of one file, which is held in host memory until it is written; the device holds one layer."""


class OutOfTime(Exception):
    """Writing has reached its deadline."""


def write_weights(model: nn.Module, folder: Path, device: torch.device, *, deadline: float | None = None) -> None:
    """Writes the config and random weights, in the files that `from_pretrained` expects.

    model: on the meta device. Raises OutOfTime at `deadline`, a time of the monotonic clock.
    """
    folder.mkdir(parents=True)
    is_diffusers = hasattr(model, "save_config")
    any_model: Any = model
    (any_model.save_config if is_diffusers else any_model.config.save_pretrained)(folder)
    name = SAFETENSORS_WEIGHTS_NAME if is_diffusers else SAFE_WEIGHTS_NAME
    places: dict[str, str] = {}
    for number, part in enumerate(_parts(model, device)):
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime(f"{type(model).__name__} was not written in time, only {len(places)} of its tensors")
        file = name.replace(".safetensors", f"-{number:05}.safetensors")
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _parts(model: nn.Module, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if sum(tensor.nbytes for tensor in part.values()) + parameter.nbytes > PART_BYTES and part:
            yield part
            part = {}
        part[name] = _draw(name, parameter, device).cpu()
    yield part


def _draw(name: str, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns random weights that keep the scale of activations about constant. Norms are 1, biases 0."""
    if parameter.ndim < 2:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(parameter.shape, dtype=parameter.dtype, device=device)
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return drawn.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5)

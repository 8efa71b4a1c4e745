"""Random weights of a model that is nowhere whole: drawn layer by layer on the device, written part by part."""

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
"""Of one file; so much lies in host memory meanwhile, and on the device one layer."""


class OutOfTime(Exception):
    """What is written would not be done in time."""


def write_weights(model: nn.Module, folder: Path, device: torch.device, *, deadline: float | None = None) -> None:
    """model: on the meta device. Beside its config, in the files that `from_pretrained` looks for.

    Raises OutOfTime at `deadline`, on the monotonic clock.
    """
    folder.mkdir(parents=True)
    is_diffusers = hasattr(model, "save_config")
    any_model: Any = model
    (any_model.save_config if is_diffusers else any_model.config.save_pretrained)(folder)
    name = SAFETENSORS_WEIGHTS_NAME if is_diffusers else SAFE_WEIGHTS_NAME
    places: dict[str, str] = {}
    for number, part in enumerate(_parts(model, device)):
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime(f"{type(model).__name__} is not written in time: {len(places)} tensors are")
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
    """So that activations stay about as large as they are: norms are 1, biases 0."""
    if parameter.ndim < 2:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(parameter.shape, dtype=parameter.dtype, device=device)
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return drawn.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5)

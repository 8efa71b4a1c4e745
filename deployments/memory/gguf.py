"""Denoisers in GGUF files: weights stay as they are stored, and each layer dequantises its own for each call."""

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig
from torch import nn

from deployments.memory.config import GGUF_WEIGHTS
from deployments.memory.unread import refuse_unread


def find_gguf(component: Path) -> Path | None:
    """Returns the GGUF file in a component's folder; None if the weights are stored in another format."""
    file = component / GGUF_WEIGHTS
    return file if file.exists() else None


def load_gguf(model_class: Any, file: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a model by its class's `from_single_file`. Weights that the file lacks stay on the meta device.

    Raises ValueError if the file has weights that the model does not use.
    """
    with refuse_unread(file.resolve()):
        return _build(model_class, str(file), file.parent, dtype, "cpu")


def gguf_as_stored(model_class: Any, file: Path, dtype: torch.dtype) -> nn.Module:
    """Returns the model of `load_gguf` on the meta device, without reading weights."""
    gguf = importlib.import_module("gguf")  # not imported by replicas without GGUF files (stages/imports.py)
    quantized = importlib.import_module("diffusers.quantizers.gguf.utils").GGUFParameter
    kinds = gguf.GGMLQuantizationType
    plain = {kinds.F32: torch.float32, kinds.F16: torch.float16}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        kind = tensor.tensor_type
        empty = torch.empty(tuple(tensor.data.shape), dtype=plain.get(kind, torch.uint8), device="meta")
        tensors[tensor.name] = empty if kind in plain else quantized(empty, quant_type=kind)
    model = _build(model_class, tensors, file.parent, dtype, "meta")
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, quantized):  # this class cannot be copied
                module._parameters[name] = nn.Parameter(weight.as_tensor(), requires_grad=False)
    return model


def _build(model_class: Any, weights: Any, folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    quantization = GGUFQuantizationConfig(compute_dtype=dtype)
    model: nn.Module = model_class.from_single_file(
        weights, config=str(folder), dtype=dtype, device=device, quantization_config=quantization
    )
    return model

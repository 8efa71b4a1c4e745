"""The bytes of a model as a stage's config stores it, computed from its skeleton without reading weights.

The libraries' own code changes the skeleton on the meta device as it would change the model. Only the size of a
weight that bitsandbytes quantises while loading is computed by a formula here.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn
from transformers.quantizers import AutoHfQuantizer

from deployments.memory.casting import cast_layers
from deployments.memory.config import MemoryConfig
from deployments.memory.device import resolve_dtype
from deployments.memory.gguf import gguf_as_stored
from deployments.memory.quantize import plan_quantization
from deployments.memory.quantized import is_4bit, is_8bit

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

_BLOCK = 64
"""Number of weights that share a scale in nf4 and fp4 (bitsandbytes' default on CUDA)."""
_NESTED_BLOCK = 256
"""Number of scales that share a second scale with `double_quant`."""


def as_stored(skeleton: nn.Module, config: MemoryConfig, *, is_quantized: bool = True) -> nn.Module:
    """Returns a copy of a model on the meta device, with the dtypes and layers that it will have once loaded.

    Args:
        is_quantized: False ignores quantisation, both the config's and the checkpoint's own.
    """
    gguf_file = getattr(skeleton, "gguf_file", None)
    if gguf_file is not None and is_quantized:
        return gguf_as_stored(type(skeleton), gguf_file, resolve_dtype(config.dtype))
    stored = copy.deepcopy(skeleton)
    model: Any = stored
    dtype = resolve_dtype(config.dtype)
    kept = _kept_in_fp32(model, dtype)
    for prefix, module in model.named_modules():
        for name, tensor in _own_weights(module):
            if tensor.is_floating_point():
                is_kept = kept.intersection(f"{prefix}.{name}".split("."))
                tensor.data = tensor.data.to(torch.float32 if is_kept else dtype)
    quantization = getattr(model.config, "quantization_config", None) if is_quantized else None
    if quantization is None and config.quantization is not None and is_quantized:
        library = "diffusers" if isinstance(model, ModelMixin) else "transformers"
        quantization = plan_quantization(config.quantization, config.dtype, library)
    if quantization is not None:
        _quantize(model, quantization, sorted(kept), dtype)
    if config.layerwise_casting is not None:
        cast_layers(model, config.layerwise_casting, dtype)
    return stored


def stored_models(skeletons: Mapping[str, nn.Module], config: MemoryConfig) -> dict[str, nn.Module]:
    """Returns all models of a stage as stored, by component name; config says which of them are quantised."""
    return {n: as_stored(model, config, is_quantized=config.quantizes(n)) for n, model in skeletons.items()}


def stored_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters and persistent buffers. The model must come from `as_stored`.
    Tied weights count once.

    Cached, because a plan needs it repeatedly. This is safe because such a model is not changed any more.
    """
    if model not in _weighed:
        _weighed[model] = _weigh(model)
    return _weighed[model]


_weighed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _weigh(model: nn.Module) -> int:
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if is_4bit(module) or is_8bit(module):
            total += _quantized_bytes(module)
            continue
        for _, tensor in _own_weights(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.nbytes
    return total


def _own_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters and persistent buffers that the module owns itself, as a checkpoint has them."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> set[str]:
    """Returns parts of the names of weights that stay in float32.

    diffusers keeps all that a model lists. transformers keeps them if dtype is float16, where they would overflow;
    for bfloat16 it keeps a separate, strict list.
    """
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if isinstance(model, ModelMixin) or dtype == torch.float16:
        return names
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return strict if dtype == torch.bfloat16 else set()


def _quantize(model: Any, config: Any, kept: list[str], dtype: torch.dtype) -> None:
    """Replaces layers by quantised ones, with the library's own code, which decides which layers it replaces."""
    if isinstance(model, ModelMixin):
        quantizer: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=kept)
    else:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    for module in model.modules():
        if (is_4bit(module) or is_8bit(module)) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


def _quantized_bytes(module: "Linear4bit | Linear8bitLt") -> int:
    """Returns the bytes of one quantised layer.

    LLM.int8: 1 byte per weight and a float32 scale per row (https://arxiv.org/abs/2208.07339). QLoRA: half a byte
    per weight and a float32 scale per 64 weights, or 1 byte with `double_quant`
    (https://arxiv.org/abs/2305.14314).
    """
    num_weights: int = module.in_features * module.out_features
    bias: int = 0 if module.bias is None else module.bias.nbytes
    if is_8bit(module):
        num_rows: int = module.out_features
        return num_weights + 4 * num_rows + bias
    num_scales = math.ceil(num_weights / _BLOCK)
    table = 16 * 4
    if module.weight.compress_statistics:
        scales = num_scales + 4 * math.ceil(num_scales / _NESTED_BLOCK) + 256 * 4
    else:
        scales = 4 * num_scales
    return math.ceil(num_weights / 2) + scales + table + bias


def dequantized_bytes(model: nn.Module, config: MemoryConfig) -> int:
    """Returns the bytes of the largest layer's weights in full, if they are quantised, else 0.

    Both bitsandbytes and GGUF layers dequantise their weights for their call, one layer at a time.
    """
    if config.quantization is None and getattr(model, "gguf_file", None) is None:
        return 0
    return max((layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear)), default=0)

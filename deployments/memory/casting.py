"""Layerwise casting of one model: weights stored in 8 bits, arithmetic in the stage's dtype."""

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn

from deployments.memory.config import LayerwiseCastingConfig

T5_OUTPUT = r"\.wo$"
"""Not cast: transformers' T5 casts activations to this layer's stored dtype, before a hook can cast its weight."""

TEXT_EMBEDDINGS = (r"^shared$", "embed_tokens", "token_embedding")
"""Not cast: these are a model's first weights. transformers takes their dtype as the model's, and pipelines take
it as that of the embeddings."""


def cast_layers(model: nn.Module, config: LayerwiseCastingConfig, compute_dtype: torch.dtype) -> None:
    """Adds layerwise casting in place. The planner applies this to models on the meta device, too."""
    dtypes = {"storage_dtype": getattr(torch, config.storage_dtype), "compute_dtype": compute_dtype}
    if config.skip_patterns is not None:
        apply_layerwise_casting(model, skip_modules_pattern=config.skip_patterns, **dtypes)
    elif isinstance(model, ModelMixin):
        model.enable_layerwise_casting(**dtypes)
    else:
        skipped = (*DEFAULT_SKIP_MODULES_PATTERN, T5_OUTPUT, *TEXT_EMBEDDINGS)
        apply_layerwise_casting(model, skip_modules_pattern=skipped, **dtypes)

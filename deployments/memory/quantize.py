"""How `from_pretrained` is told to quantise: diffusers and transformers have a class each, of equal keys."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import transformers

from deployments.device import resolve_dtype
from deployments.memory.config import Dtype, QuantizationConfig


def plan_quantization(config: QuantizationConfig, dtype: Dtype, library: str) -> Any:
    """`quantization_config` of one model's `from_pretrained`; library: transformers, or else of diffusers."""
    kind: Any = (transformers if library == "transformers" else diffusers).BitsAndBytesConfig
    skip = list(config.skip_modules) or None
    if config.kind == "int8":
        # It tells of every layer, at every forward, that it computes in float16: 14,000 lines a picture of FLUX.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return kind(load_in_8bit=True, llm_int8_threshold=config.threshold, llm_int8_skip_modules=skip)
    return kind(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.kind,
        bnb_4bit_compute_dtype=resolve_dtype(config.compute_dtype or dtype),
        bnb_4bit_use_double_quant=config.double_quant,
        llm_int8_skip_modules=skip,
    )


def plan_stage_quantization(
    config: QuantizationConfig, dtype: Dtype, index: Mapping[str, Any], models: Iterable[str]
) -> dict[str, Any]:
    """`quantization_config` of those of a stage's models that are quantised.

    Raises ValueError if config names a component that is none of them.
    """
    models = sorted(models)
    components = models if config.components is None else list(config.components)
    unknown = [name for name in components if name not in models]
    if unknown:
        raise ValueError(f"quantization.components: no {unknown[0]} in this stage; it has {', '.join(models)}")
    return {name: plan_quantization(config, dtype, index[name][0]) for name in components}

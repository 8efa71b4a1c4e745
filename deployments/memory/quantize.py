"""Builds the `quantization_config` of `from_pretrained`: diffusers and transformers have a class each for it."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import transformers

from deployments.memory.config import Dtype, QuantizationConfig
from deployments.memory.device import resolve_dtype


def plan_quantization(config: QuantizationConfig, dtype: Dtype, library: str) -> Any:
    """Returns one model's `quantization_config`. library: "transformers"; any other means diffusers."""
    kind: Any = (transformers if library == "transformers" else diffusers).BitsAndBytesConfig
    skip = list(config.skip_modules) or None
    if config.kind == "int8":
        # bitsandbytes logs at each layer's every forward that it computes in float16: 14,000 lines per FLUX image.
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
    """Returns the `quantization_config` of each model of a stage that is quantised, by component name.

    Raises ValueError if config names a component that the stage does not have.
    """
    models = sorted(models)
    components = models if config.components is None else list(config.components)
    unknown = [name for name in components if name not in models]
    if unknown:
        raise ValueError(f"quantization.components: this stage has no {unknown[0]}; it has {', '.join(models)}")
    return {name: plan_quantization(config, dtype, index[name][0]) for name in components}

"""A diffusers pipeline of which only some components are loaded."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from deployments.checkpoints.components import ModelIndex, component_names
from deployments.config import StageConfig
from deployments.device import resolve_dtype
from deployments.memory.quantize import plan_pipeline_quantization


def load_pipeline(
    folder: Path, index: ModelIndex, keep: frozenset[str], config: StageConfig, *, variant: str | None
) -> Any:
    """The checkpoint's own pipeline class with the components named in `keep`; all others are None.

    Safety checkers and image encoders are none of the three stages' and are never loaded.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # their warnings advise on calls that are not ours to change
    absent: dict[str, Any] = dict.fromkeys(component_names(index) - keep)
    if "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    options: dict[str, Any] = {"dtype": resolve_dtype(config.dtype), "variant": variant}
    models = [name for name in keep if name.startswith(("text_encoder", "vae"))]
    if config.quantization is not None and models:
        options["quantization_config"] = plan_pipeline_quantization(
            config.quantization, config.dtype, index, models
        )
    # DiffusionPipeline's own takes Wan's optional transformer for a setting, and would load it in every stage.
    pipeline_class = getattr(diffusers, index["_class_name"], diffusers.DiffusionPipeline)
    pipe = pipeline_class.from_pretrained(folder, **absent, **options, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded_models(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models by component name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}

"""The torch side of each stage: what runs in a replica's threads.

Read in this order: imports, pipeline (one stage's components of a checkpoint), encode, denoise,
follow (denoise on the other ranks), decode, media.
Importing this package imports no torch; `load_stage` does, when a replica calls it.
"""

import importlib
from typing import Any

from deployments.config import ModelConfig, StageConfig
from deployments.stages.imports import skip_unneeded

STAGES = {
    "encode": "deployments.stages.encode:TextEncoding",
    "denoise": "deployments.stages.denoise:Denoising",
    "follow": "deployments.stages.follow:Following",
    "decode": "deployments.stages.decode:Decoding",
}


def load_stage(stage: str, model: ModelConfig, config: StageConfig, *args: Any) -> Any:
    """Build a stage by name. Looked up late: a replica does everything of Ray before it imports torch."""
    skip_unneeded(model, config)
    module, _, name = STAGES[stage].partition(":")
    return getattr(importlib.import_module(module), name)(model, config, *args)

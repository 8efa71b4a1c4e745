"""Which components of a checkpoint belong to which stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import ModelConfig
from deployments.families import Family

Stage = Literal["encode", "denoise", "decode"]

ModelIndex = Mapping[str, Any]
"""A checkpoint's model_index.json: component names with [library, class], and settings."""


def fetch_stage(model: ModelConfig, stage: Stage) -> tuple[Path, ModelIndex]:
    """The checkpoint's folder, holding at least what `stage` needs, and its model_index.json."""
    source = {"revision": model.revision, "variant": model.variant}
    index = read_json(fetch_checkpoint(model.checkpoint, (), **source) / "model_index.json")
    folder = fetch_checkpoint(model.checkpoint, stage_components(index, model.architecture, stage), **source)
    return folder, index


def stage_components(index: ModelIndex, family: Family, stage: Stage) -> frozenset[str]:
    """Names of the components that `stage` needs."""
    if stage == "encode":
        return frozenset(n for n in component_names(index) if n.startswith(("text_encoder", "tokenizer")))
    return frozenset({"vae"} if stage == "decode" else {family.denoiser, "scheduler"})


def component_names(index: ModelIndex) -> frozenset[str]:
    """All components that the checkpoint has."""
    return frozenset(name for name, entry in index.items() if isinstance(entry, list) and entry[0])

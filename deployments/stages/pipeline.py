"""A diffusers pipeline of which only one stage's components are loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import Dtype, ModelConfig, StageConfig
from deployments.families import Family

Stage = Literal["encode", "denoise", "decode"]


def fetch_stage(model: ModelConfig, family: Family, stage: Stage) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's folder, holding at least what `stage` needs, and its model_index.json."""
    source = {"revision": model.revision, "variant": model.variant}
    index = json.loads((fetch_checkpoint(model.checkpoint, (), **source) / "model_index.json").read_text())
    folder = fetch_checkpoint(model.checkpoint, stage_components(index, family, stage), **source)
    return folder, index


def load_pipeline(
    folder: Path, index: Mapping[str, Any], keep: frozenset[str], *, dtype: torch.dtype, variant: str | None
) -> Any:
    """The checkpoint's own pipeline class with the components named in `keep`; all others are None.

    Safety checkers and image encoders are none of the three stages' and are never loaded.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # their warnings advise on calls that are not ours to change
    absent: dict[str, Any] = dict.fromkeys(_components(index) - keep)
    if "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    pipe = DiffusionPipeline.from_pretrained(
        folder, **absent, dtype=dtype, variant=variant, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stage_components(index: Mapping[str, Any], family: Family, stage: Stage) -> frozenset[str]:
    """Names of the components in model_index.json that `stage` needs."""
    if stage == "encode":
        return frozenset(n for n in _components(index) if n.startswith(("text_encoder", "tokenizer")))
    return frozenset({"vae"} if stage == "decode" else {family.denoiser, "scheduler"})


def _components(index: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, entry in index.items() if isinstance(entry, list) and entry[0])


def resolve_device(config: StageConfig) -> torch.device:
    """`auto` is CUDA where Ray gave this replica a GPU and torch sees one, else the CPU."""
    if config.device == "auto":
        return torch.device("cuda" if config.num_gpus and torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

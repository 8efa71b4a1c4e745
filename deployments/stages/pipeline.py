"""A diffusers pipeline of which only some components are loaded."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deployments.checkpoints.components import ModelIndex, component_names


def load_pipeline(
    folder: Path, index: ModelIndex, keep: frozenset[str], *, dtype: torch.dtype, variant: str | None
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
    pipe = DiffusionPipeline.from_pretrained(folder, **absent, dtype=dtype, variant=variant, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe

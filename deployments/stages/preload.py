"""What the processes of all three stages import alike, and so may share (cluster/fork_server.py)."""

import importlib
import os
import sys

from deployments.config import ModelConfig, StageConfig
from deployments.stages import STAGES
from deployments.stages.imports import UNNEEDED, needed_packages, silence_imports, skip


def plan_preload(model: ModelConfig, config: StageConfig) -> list[str] | None:
    """What a fork server does before it forks this stage's processes; None if they are to import for themselves.

    Those are that need what others skip, or may: bitsandbytes opens a GPU when it is imported, and that does not
    survive a fork.
    """
    try:
        if needed_packages(model, config):
            return None
    except (ValueError, OSError):  # the checkpoint is elsewhere
        return None
    classes = (call.pipeline_class for call in model.architecture.calls.values())
    return [f"{__name__}:{preload.__name__}", *classes]


def preload(*pipeline_classes: str) -> None:
    """All that the stages import of a model without quantised weights."""
    silence_imports()
    skip(UNNEEDED)
    for path in (*STAGES.values(), "diffusers.guiders"):
        importlib.import_module(path.partition(":")[0])
    diffusers = sys.modules["diffusers"]
    for name in pipeline_classes:  # a pipeline's module imports the classes of its models
        getattr(diffusers, name, None)
    os.register_at_fork(after_in_child=sys.modules["numpy"].random.seed)  # else all would draw the same

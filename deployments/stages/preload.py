"""Imports that the processes of all three stages have in common, and so may share (cluster/fork_server.py)."""

import importlib
import os
import sys

from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.stages import STAGES
from deployments.stages.imports import OPTIONAL_PACKAGES, needed_packages, silence_imports, skip

FORK_SAFE_PACKAGES = frozenset({"peft"})
"""Packages of OPTIONAL_PACKAGES that may be imported before a fork. bitsandbytes opens a GPU, which fails after a
fork."""


def plan_preload(model: ModelConfig, config: StageConfig) -> list[str] | None:
    """Returns what a fork server calls and imports before it forks a stage's processes.

    None: the processes have to import for themselves.
    """
    try:
        needed = needed_packages(model, config)
    except (ValueError, OSError):  # the checkpoint is not on this machine
        return None
    if needed - FORK_SAFE_PACKAGES:
        return None
    classes = (call.pipeline_class for call in model.architecture.calls.values())
    return [f"{__name__}:{preload.__name__}", *sorted(needed), *classes]


def preload(*names: str) -> None:
    """Imports all that the stages import for a model.

    names: packages of OPTIONAL_PACKAGES that the model needs, and pipeline classes.
    """
    silence_imports()
    skip(OPTIONAL_PACKAGES - {*names})
    for path in (*STAGES.values(), "diffusers.guiders"):
        importlib.import_module(path.partition(":")[0])
    diffusers = sys.modules["diffusers"]
    for name in names:  # a pipeline's module imports the classes of its models
        getattr(diffusers, name, None)
    os.register_at_fork(after_in_child=sys.modules["numpy"].random.seed)  # or all would draw the same

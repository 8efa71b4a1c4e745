"""Derives a pipeline's family in the test's process, which has torch already; an app derives it in another one."""

import json
from functools import cache
from pathlib import Path

from deployments.checkpoints.derived import read_derived
from deployments.checkpoints.source import detect_family, fetch_configs, with_family
from deployments.config.model import ModelConfig
from deployments.families import FAMILIES, Family, Geometry
from deployments.stages.trials.derive import Derived


def with_family_here(model: ModelConfig) -> ModelConfig:
    """Does what `with_family` does, in this process."""
    family = model.family or detect_family(model.layout, model.revision)
    if family in FAMILIES:
        return with_family(model)
    return model.with_derived_family(*_derive(fetch_configs(model.layout, revision=model.revision), family))


@cache
def _derive(folder: Path, pipeline_class: str) -> tuple[Family, Geometry]:
    return read_derived(pipeline_class, json.loads(json.dumps(Derived(folder).describe())))

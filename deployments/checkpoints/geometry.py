"""What sizes a checkpoint makes, read from its components' configs. Imports no torch: the ingress asks."""

import logging
from pathlib import Path

from deployments.checkpoints.components import check_served, read_index
from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.source import fetch_configs
from deployments.config import ModelConfig
from deployments.families import Family, Geometry

log = logging.getLogger("ray.serve")


def with_geometry(model: ModelConfig) -> ModelConfig:
    """The same, and what sizes its checkpoint makes, unless that is known already. Its family must be.

    Where the checkpoint cannot be read but its family is said, the published model's sizes are assumed; the
    denoise stage, which can read it, compares.

    Raises:
        ValueError: a component is missing, or would be served by no stage.
        FileNotFoundError: the checkpoint is here and lacks a config.
    """
    if model.has_geometry:
        return model
    family = model.architecture
    try:
        geometry = read_geometry(fetch_configs(model.checkpoint, revision=model.revision), family)
    except FileNotFoundError as error:
        if Path(model.checkpoint).expanduser().exists():
            raise
        log.warning("sizes are assumed to be those of the published %s: %s", family.pipeline_class, error)
        geometry = family.geometry(family.published)
    return model.with_geometry(geometry)


def read_geometry(folder: Path, family: Family) -> Geometry:
    """Of the checkpoint in this folder, which need not have more than configs. Raises as `with_geometry`."""
    check_served(folder, read_index(folder), family)
    files = {name: folder / name / "config.json" for name in family.published}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}/config.json, by which sizes are told")
    return family.geometry({name: read_json(file) for name, file in files.items()})

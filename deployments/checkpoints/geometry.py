"""What sizes a checkpoint makes, read from its components' configs. Imports no torch: the ingress asks."""

import logging
from pathlib import Path

from deployments.checkpoints.components import check_served, needed_names, read_index
from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.source import fetch_configs
from deployments.checkpoints.weights import find_file_faults
from deployments.config import ModelConfig
from deployments.families import Family, Geometry
from deployments.families.calls import known_calls

log = logging.getLogger("ray.serve")


def with_geometry(model: ModelConfig) -> ModelConfig:
    """The same, and what sizes and kinds of call its checkpoint makes, unless that is known. Its family must be.

    Where the checkpoint cannot be read but its family is said, the published model's sizes are assumed; the
    denoise stage, which can read it, compares.

    Raises:
        ValueError: a component is missing, or would be served by no stage, or a config is broken.
        FileNotFoundError: the checkpoint is here and lacks a config.
    """
    if model.has_geometry:
        return model
    family = model.architecture
    try:
        folder = fetch_configs(model.layout, revision=model.revision)
        geometry = read_geometry(folder, family)
    except FileNotFoundError as error:
        if Path(model.layout).expanduser().exists():
            raise
        log.warning("sizes are assumed to be those of the published %s: %s", family.pipeline_class, error)
        return model.with_geometry(family.geometry(family.published))
    return model.with_kinds(known_calls(family.calls, needed_names(read_index(folder)))).with_geometry(geometry)


def read_geometry(folder: Path, family: Family) -> Geometry:
    """Of the checkpoint in this folder, which need not have more than configs. Raises as `with_geometry`."""
    check_served(folder, read_index(folder), family)
    files = {name: folder / name / "config.json" for name in family.published}
    for name, file in files.items():
        if not file.exists() and not file.is_symlink():
            raise FileNotFoundError(f"{folder} lacks {name}/config.json, by which sizes are told")
        for fault in find_file_faults(file):
            raise ValueError(fault)
    configs = {name: read_settings(file) for name, file in files.items()}
    try:
        return family.geometry(configs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What configs say may be of any type.
        where = " and ".join(str(file) for file in files.values())
        raise ValueError(f"no sizes can be told by {where}: {error}") from error

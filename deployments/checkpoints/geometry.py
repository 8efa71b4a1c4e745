"""Reads the sizes that a checkpoint makes from its components' configs. Imports no torch: the ingress uses it."""

import logging
from pathlib import Path

from deployments.checkpoints.components import check_served, needed_names, read_index
from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.source import fetch_configs
from deployments.checkpoints.weights import find_file_faults
from deployments.config.model import ModelConfig
from deployments.errors import CannotServe
from deployments.families import Family, Geometry
from deployments.families.calls import known_calls

log = logging.getLogger("ray.serve")


def with_geometry(model: ModelConfig) -> ModelConfig:
    """Returns a copy with the sizes and kinds of call of its checkpoint, unless known. The family must be known.

    If the checkpoint cannot be read here, the sizes of the family's published model are assumed; the denoise
    stage, which can read the checkpoint, compares them (`check_geometry`).

    Raises:
        ValueError: a component is missing, or no stage would serve it, or a config is broken.
        FileNotFoundError: the checkpoint is a local path and lacks a config.
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
    """Returns the geometry of the checkpoint in this folder, which needs only configs.

    Raises ValueError or FileNotFoundError as `with_geometry`.
    """
    check_served(folder, read_index(folder), family)
    files = {name: folder / name / "config.json" for name in family.published}
    for name, file in files.items():
        if not file.exists() and not file.is_symlink():
            raise FileNotFoundError(f"{folder} lacks {name}/config.json, which gives the sizes")
        for fault in find_file_faults(file):
            raise ValueError(fault)
    configs = {name: read_settings(file) for name, file in files.items()}
    try:
        return family.geometry(configs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Values in configs may be of any type.
        where = " and ".join(str(file) for file in files.values())
        raise ValueError(f"the sizes cannot be read from {where}: {error}") from error


def check_geometry(folder: Path, model: ModelConfig) -> None:
    """Raises CannotServe if the app assumed other sizes than the checkpoint's, which is possible if the app was
    built where the checkpoint could not be read."""
    found = read_geometry(folder, model.architecture)
    if found != model.geometry:
        raise CannotServe(
            f"the app was built for other sizes than {folder} makes: {model.geometry}; its configs say {found}. "
            "Build the app where model_index.json and every config.json can be read"
        )

"""Reads and checks local checkpoint files before anything starts."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import constants

from deployments.checkpoints.components import Stage, with_own_scheduler
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.integrity import find_offload_faults, find_stage_faults
from deployments.checkpoints.sharing import check_same
from deployments.checkpoints.source import is_tiny, local_folder, with_family
from deployments.config.model import ModelConfig
from deployments.options.adapter import find_missing as find_missing_adapters
from serve_app.auth.config import AuthConfig
from serve_app.auth.keys import KeyFault, read_keys
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.served_model import ServedModelConfig

STAGES: dict[str, Stage] = {"encoder": "encode", "transformer": "denoise", "vae": "decode"}
"""Stages by their names in a config."""


def shared_stages(served: ServedModelConfig) -> tuple[Stage, ...]:
    """Returns the stages that belong to another model."""
    return tuple(STAGES[name] for name, owner in served.owners.items() if owner != served.name)


def resolve_family(config: AppConfig) -> AppConfig:
    """Returns the config with each model's family (as configured, or else by its checkpoint), geometry and
    scheduler.

    Raises ConfigError.
    """
    models = []
    for served in config.served:
        with config.naming(served):
            models.append(_resolved(served))
    return config.serving(models)


def _resolved(served: ServedModelConfig) -> ServedModelConfig:
    try:
        return served.model_copy(update={"model": with_own_scheduler(with_geometry(with_family(served.model)))})
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.checkpoint: {error}") from error


def check_files(config: AppConfig) -> None:
    """Checks the files of an app that only this machine serves. Takes milliseconds, and imports no torch.

    Files that are still to be downloaded are checked by each replica once it has them. Raises ConfigError, with a
    line for each fault.
    """
    found = find_key_faults(config.auth)
    models = {served.name: served.model for served in config.served}
    for served in config.served:
        try:
            with config.naming(served):
                _check_files(served)
                _check_shared(served, models)
        except ConfigError as error:
            found.append(str(error))
    if found:
        raise ConfigError("\n".join(found))


def _check_files(served: ServedModelConfig) -> None:
    faults = dict.fromkeys(find_missing_adapters(served.model.adapters, served.model.adapters_folder))
    for name, stage in STAGES.items():
        stage_config = served.stages[name]
        faults |= dict.fromkeys(find_offload_faults(stage, stage_config))
        try:
            if is_here(served.model):
                faults |= dict.fromkeys(find_stage_faults(served.model, stage, stage_config))
        except (ValueError, OSError) as error:
            faults[f"model.checkpoint: {error}"] = None
    if faults:
        raise ConfigError("\n".join(faults))


def find_missing(args: Any) -> Iterator[str]:
    """Yields a line for each checkpoint that is not where a config says, whatever else is wrong with it."""
    found = args if isinstance(args, dict) else {}
    for section in (found, *_as_list(found.get("models"))):
        model = section.get("model") if isinstance(section, dict) else None
        checkpoint = model.get("checkpoint") if isinstance(model, dict) else None
        try:
            if isinstance(checkpoint, str):
                local_folder(checkpoint)
        except (ValueError, OSError) as error:
            yield f"model.checkpoint: {error}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def find_key_faults(auth: AuthConfig | None) -> list[str]:
    """Returns the faults of the file of keys."""
    try:
        if auth is not None:
            read_keys(auth.keys_path)
    except (KeyFault, FileNotFoundError) as error:
        return [f"auth.keys_file: {line}" for line in str(error).splitlines()]
    return []


def _check_shared(served: ServedModelConfig, models: Mapping[str, ModelConfig]) -> None:
    """Raises ConfigError if a stage is shared by checkpoints in which it differs."""
    for name, owner in served.owners.items():
        if owner == served.name or not (is_here(served.model) and is_here(models[owner])):
            continue
        try:
            check_same(models[owner], served.model, STAGES[name], served.stages[name].dtype)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{name}.shared_with: {error}; give this model its own {name}") from error


def is_here(model: ModelConfig) -> bool:
    """Whether nothing remains to be downloaded: the model is a folder, or a hub ID that must be complete in the
    offline cache."""
    is_folder = local_folder(model.layout, model.revision) is not None
    return is_folder or (constants.HF_HUB_OFFLINE and not is_tiny(model.layout))

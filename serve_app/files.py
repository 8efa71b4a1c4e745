"""What the checkpoint's files say, and whether they are whole: asked where they lie, before anything starts."""

from collections.abc import Mapping

from huggingface_hub import constants

from deployments.adapter import find_missing
from deployments.checkpoints.components import Stage, with_own_scheduler
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.integrity import find_offload_faults, find_stage_faults
from deployments.checkpoints.sharing import check_same
from deployments.checkpoints.source import is_tiny, local_folder, with_family
from deployments.config import ModelConfig
from serve_app.auth.config import AuthConfig
from serve_app.auth.keys import KeyFault, read_keys
from serve_app.config import AppConfig, ConfigError, ServedModelConfig

STAGES: dict[str, Stage] = {"encoder": "encode", "transformer": "denoise", "vae": "decode"}
"""By their names in a config."""


def shared_stages(served: ServedModelConfig) -> tuple[Stage, ...]:
    """Those that are another model's."""
    return tuple(STAGES[name] for name, holder in served.holders.items() if holder != served.name)


def resolve_family(config: AppConfig) -> AppConfig:
    """The same, each model's family as said or as its checkpoint says, its sizes and its scheduler.

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
    """For this machine, where no other has a part in it. Takes milliseconds, and imports no torch.

    What is still to be downloaded, each replica checks once it has it. Raises ConfigError, a line for each fault.
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
    faults = dict.fromkeys(find_missing(served.model.adapters, served.model.adapters_folder))
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


def find_key_faults(auth: AuthConfig | None) -> list[str]:
    """Of the file of keys."""
    try:
        if auth is not None:
            read_keys(auth.keys_path)
    except (KeyFault, FileNotFoundError) as error:
        return [f"auth.keys_file: {line}" for line in str(error).splitlines()]
    return []


def _check_shared(served: ServedModelConfig, models: Mapping[str, ModelConfig]) -> None:
    """Raises ConfigError where a stage is shared by checkpoints that differ in it."""
    for name, holder in served.holders.items():
        if holder == served.name or not (is_here(served.model) and is_here(models[holder])):
            continue
        try:
            check_same(models[holder], served.model, STAGES[name], served.stages[name].dtype)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{name}.shared_with: {error}; give it one of its own") from error


def is_here(model: ModelConfig) -> bool:
    """Whether nothing is still to come: a folder, or a hub id of which the hub's cache must have all."""
    is_folder = local_folder(model.layout, model.revision) is not None
    return is_folder or (constants.HF_HUB_OFFLINE and not is_tiny(model.layout))

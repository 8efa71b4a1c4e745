"""What the checkpoint's files say, and whether they are whole: asked where they lie, before anything starts."""

from huggingface_hub import constants

from deployments.adapter import find_missing
from deployments.checkpoints.components import Stage
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.integrity import find_offload_faults, find_stage_faults
from deployments.checkpoints.source import is_tiny, local_folder, with_family
from deployments.config import ModelConfig
from serve_app.config import AppConfig, ConfigError

STAGES: dict[str, Stage] = {"encoder": "encode", "transformer": "denoise", "vae": "decode"}
"""By their names in a config."""


def resolve_family(config: AppConfig) -> AppConfig:
    """The same, the model's family as said or as the checkpoint says, and its sizes. Raises ConfigError."""
    try:
        return config.model_copy(update={"model": with_geometry(with_family(config.model))})
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.checkpoint: {error}") from error


def check_files(config: AppConfig) -> None:
    """For this machine, where no other has a part in it. Takes milliseconds, and imports no torch.

    What is still to be downloaded, each replica checks once it has it. Raises ConfigError, a line for each fault.
    """
    faults = dict.fromkeys(find_missing(config.model.adapters, config.model.adapters_folder))
    for name, stage in STAGES.items():
        stage_config = config.stages[name]
        faults |= dict.fromkeys(find_offload_faults(stage, stage_config))
        try:
            if _is_here(config.model):
                faults |= dict.fromkeys(find_stage_faults(config.model, stage, stage_config))
        except (ValueError, OSError) as error:
            faults[f"model.checkpoint: {error}"] = None
    if faults:
        raise ConfigError("\n".join(faults))


def _is_here(model: ModelConfig) -> bool:
    """Whether nothing is still to come: a folder, or a hub id of which the hub's cache must have all."""
    is_folder = local_folder(model.layout, model.revision) is not None
    return is_folder or (constants.HF_HUB_OFFLINE and not is_tiny(model.layout))

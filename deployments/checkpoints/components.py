"""Which components of a checkpoint belong to which stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.parts import open_checkpoint
from deployments.checkpoints.source import fetch_configs
from deployments.config import ModelConfig
from deployments.families import Family
from deployments.memory.config import Dtype

Stage = Literal["encode", "denoise", "decode"]

ModelIndex = Mapping[str, Any]
"""A checkpoint's model_index.json: component names with [library, class], and settings."""

NEVER_LOADED = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermark"})
"""No stage has them, and pipelines that draw from a prompt do without."""


def fetch_stage(model: ModelConfig, stage: Stage, dtype: Dtype) -> tuple[Path, ModelIndex]:
    """The checkpoint's folder, holding what `stage` needs and every model's config, and its model_index.json.

    dtype: that of the stage, for what lies in a file and must be converted.
    """
    index = read_index(fetch_configs(model.layout, revision=model.revision))
    components = stage_components(index, model.architecture, stage)
    return open_checkpoint(model, index, components, dtype), index


def read_index(folder: Path) -> ModelIndex:
    """Raises as `read_settings`."""
    return read_settings(folder / "model_index.json")


def stage_components(index: ModelIndex, family: Family, stage: Stage) -> frozenset[str]:
    """Names of the components that `stage` needs."""
    if stage == "encode":
        texts = frozenset(n for n in component_names(index) if n.startswith(("text_encoder", "tokenizer")))
        return texts | {"scheduler"}
    if stage == "decode":
        return frozenset({"vae"})
    return frozenset({family.denoiser, "scheduler", *(("vae",) if family.reads_vae_buffers else ())})


def is_denoiser(name: str, index: ModelIndex) -> bool:
    """Of diffusers' models those that are no VAE, no scheduler and no guider: told by their classes' names."""
    library, class_name = index[name]
    others = ("Scheduler", "Guidance", "VAE", "VQModel", "Autoencoder")
    return library == "diffusers" and not any(part in class_name for part in others)


def component_names(index: ModelIndex) -> frozenset[str]:
    """All components that the checkpoint has."""
    return frozenset(name for name, entry in index.items() if _is_component(entry) and entry[0] is not None)


def left_out(index: ModelIndex) -> frozenset[str]:
    """Components that its pipeline knows and the checkpoint does without: [null, null]."""
    return frozenset(name for name, entry in index.items() if _is_component(entry) and entry[0] is None)


def check_served(folder: Path, index: ModelIndex, family: Family) -> None:
    """Raises ValueError if some stage would lack what it cannot do without, or a model would be in no stage."""
    names = component_names(index)
    pipeline = f"{folder}, a {index.get('_class_name')}"
    lacking = sorted({family.denoiser, "scheduler", "vae"} - names)
    if lacking:
        raise ValueError(f"{pipeline}, has no {' and no '.join(lacking)}, which family {family.name} needs")
    served: frozenset[str] = frozenset().union(
        *(stage_components(index, family, stage) for stage in ("encode", "denoise", "decode"))
    )
    others = sorted(n for n in names - served - NEVER_LOADED if (folder / n / "config.json").is_file())
    if others:
        raise ValueError(
            f"{pipeline}, has a model that no stage serves: {', '.join(others)}; of the denoisers family "
            f"{family.name} runs {family.denoiser} alone. Serve a checkpoint without it"
        )


def _is_component(entry: Any) -> bool:
    """Settings may be lists, too."""
    return isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)

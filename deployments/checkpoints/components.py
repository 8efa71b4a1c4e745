"""Assigns a checkpoint's components to stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.modular import MODEL_INDEX, is_modular
from deployments.checkpoints.parts import open_checkpoint
from deployments.checkpoints.source import fetch_configs
from deployments.config.model import ModelConfig
from deployments.families import Family
from deployments.memory.config import Dtype

Stage = Literal["encode", "denoise", "decode"]

ModelIndex = Mapping[str, Any]
"""A checkpoint's model_index.json: [library, class] by component name, and settings."""

SEE_PICTURES = frozenset({"processor", "image_processor", "feature_extractor", "image_encoder"})
"""Components that read images, in the encode stage of pipelines that need images. In other pipelines an image
encoder is for IP-Adapters or the safety checker, and is not loaded."""
_REWRITERS = frozenset({"pe", "prompt_enhancer", "prompt_upsampler"})
"""Language models that rewrite prompts. They are not loaded: prompts are encoded as given."""
NEVER_LOADED = SEE_PICTURES | _REWRITERS | {"safety_checker", "watermark", "motion_adapter", "duration_head"}
"""Components that a pipeline does not need here. A motion adapter's weights were saved with the UNet, too, and
instead of a duration head the request sets the length."""
TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
"""How the names of components begin that turn texts into a denoiser's inputs."""
VAES = frozenset({"vae", "audio_vae"})
DECODERS = VAES | {"vocoder"}
"""Components that make pixels or sound from latents."""
_NO_DENOISERS = ("Scheduler", "Guidance", "VAE", "VQModel", "Autoencoder", "Vocoder", "MotionAdapter")
"""Parts of the names of diffusers' classes that are not denoisers."""


def fetch_stage(model: ModelConfig, stage: Stage, dtype: Dtype) -> tuple[Path, ModelIndex]:
    """Returns a folder with the components that `stage` needs and every model's config, and the index.

    dtype: the stage's, to which weights in single files are converted.
    """
    index = read_index(fetch_configs(model.layout, revision=model.revision))
    components = stage_components(index, model.architecture, stage)
    return open_checkpoint(model, index, components, dtype), index


def read_index(folder: Path) -> ModelIndex:
    """Reads a checkpoint's model_index.json. Raises the errors of `read_settings`."""
    return read_settings(folder / MODEL_INDEX)


def with_own_scheduler(model: ModelConfig) -> ModelConfig:
    """Returns a copy with the class of the checkpoint's scheduler, if the checkpoint can be read here.

    Raises the errors of `read_settings`.
    """
    try:
        index = read_index(fetch_configs(model.layout, revision=model.revision))
    except FileNotFoundError:
        return model
    return model.with_own_scheduler(index["scheduler"][1]) if "scheduler" in component_names(index) else model


def stage_components(index: ModelIndex, family: Family, stage: Stage) -> frozenset[str]:
    """Returns the names of the components that `stage` needs."""
    light = weightless(index)
    if stage == "encode":
        names = component_names(index)
        texts = frozenset(n for n in names if n.startswith(TEXT_PARTS))
        return texts | (SEE_PICTURES & names if family.call.kind != "generate" else frozenset()) | light
    if stage == "decode":
        return frozenset({"vae", *(DECODERS & component_names(index)), *light})
    buffers = VAES & component_names(index) if family.reads_vae_buffers else frozenset()
    return frozenset({*denoiser_names(index), *light, *buffers})


def weightless(index: ModelIndex) -> frozenset[str]:
    """Returns the names of schedulers and guiders, of which every stage has its own copy."""
    return frozenset(name for name in component_names(index) if name == "scheduler" or name.endswith("guider"))


def denoiser_names(index: ModelIndex) -> tuple[str, ...]:
    """Returns the denoisers in the order of the index. Most checkpoints have one; Wan 2.2 has an expert for high
    noise and one for low noise.

    Denoisers are those of diffusers' components that, by their class names, are no VAE, scheduler or guider.
    """
    components = component_names(index)
    models = (name for name in index if name in components and index[name][0] == "diffusers")
    return tuple(name for name in models if not any(part in index[name][1] for part in _NO_DENOISERS))


def needed_names(index: ModelIndex) -> frozenset[str]:
    """Returns the names of denoisers and of settings that are set. A pipeline class that does not know all of them
    would use half of the model, as WanVideoToVideoPipeline would use one of Wan 2.2's two experts."""
    settings = {n for n, value in index.items() if value and not n.startswith("_") and not _is_component(value)}
    return frozenset({*denoiser_names(index), *settings})


def component_names(index: ModelIndex) -> frozenset[str]:
    """Returns the names of all components that the checkpoint has."""
    return frozenset(name for name, entry in index.items() if _is_component(entry) and entry[0] is not None)


def left_out(index: ModelIndex) -> frozenset[str]:
    """Returns the names of optional components of the pipeline that the checkpoint lacks: [null, null]."""
    return frozenset(name for name, entry in index.items() if _is_component(entry) and entry[0] is None)


def check_served(folder: Path, index: ModelIndex, family: Family) -> None:
    """Raises ValueError if a stage would lack a component that it needs, or a model would belong to no stage."""
    names = component_names(index)
    pipeline = f"{folder}, a {index.get('_class_name')}"
    made = {"scheduler"} if is_modular(index) else set[str]()  # blocks create components without weights
    lacking = sorted({"scheduler", "vae"} - names - made)
    if not denoiser_names(index):
        lacking.insert(0, "denoiser (transformer or unet)")
    if lacking:
        raise ValueError(f"{pipeline}, has no {' and no '.join(lacking)}, which family {family.name} needs")
    served: frozenset[str] = frozenset().union(
        *(stage_components(index, family, stage) for stage in ("encode", "denoise", "decode"))
    )
    others = sorted(n for n in names - served - NEVER_LOADED if (folder / n / "config.json").is_file())
    if others:
        raise ValueError(
            f"{pipeline}, has a model that no stage serves: {', '.join(others)}; there are stages for text "
            "encoders, denoisers and VAEs. Serve a checkpoint without it"
        )


def is_controlnet(component: str) -> bool:
    """Whether a component is a ControlNet. Its residuals are many times as large as a denoiser's prediction, and
    only the forward of the same step uses them."""
    return component.startswith("controlnet")


def _is_component(entry: Any) -> bool:
    """Whether an entry of the index is a component. Settings may be lists, too."""
    return isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)

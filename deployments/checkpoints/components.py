"""Which components of a checkpoint belong to which stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.modular import MODEL_INDEX, is_modular
from deployments.checkpoints.parts import open_checkpoint
from deployments.checkpoints.source import fetch_configs
from deployments.config import ModelConfig
from deployments.families import Family
from deployments.memory.config import Dtype

Stage = Literal["encode", "denoise", "decode"]

ModelIndex = Mapping[str, Any]
"""A checkpoint's model_index.json: component names with [library, class], and settings."""

SEE_PICTURES = frozenset({"processor", "image_processor", "feature_extractor", "image_encoder"})
"""What the encode stage shows pictures to, of pipelines that need some. Others have an image encoder for IP-
Adapters, or to look for what is not safe."""
_REWRITERS = frozenset({"pe", "prompt_enhancer", "prompt_upsampler"})
"""Language models that rewrite prompts, which are encoded as they are given."""
NEVER_LOADED = SEE_PICTURES | _REWRITERS | {"safety_checker", "watermark", "motion_adapter", "duration_head"}
"""Pipelines do without: what a motion adapter holds, the UNet was saved with, and who asks says how long."""
TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
"""How names begin of what makes texts into what a denoiser takes."""
VAES = frozenset({"vae", "audio_vae"})
DECODERS = VAES | {"vocoder"}
"""What makes pixels, and sound, of latents."""
_NO_DENOISERS = ("Scheduler", "Guidance", "VAE", "VQModel", "Autoencoder", "Vocoder", "MotionAdapter")
"""In names of classes."""


def fetch_stage(model: ModelConfig, stage: Stage, dtype: Dtype) -> tuple[Path, ModelIndex]:
    """The checkpoint's folder, holding what `stage` needs and every model's config, and its model_index.json.

    dtype: that of the stage, for what lies in a file and must be converted.
    """
    index = read_index(fetch_configs(model.layout, revision=model.revision))
    components = stage_components(index, model.architecture, stage)
    return open_checkpoint(model, index, components, dtype), index


def read_index(folder: Path) -> ModelIndex:
    """Raises as `read_settings`."""
    return read_settings(folder / MODEL_INDEX)


def with_own_scheduler(model: ModelConfig) -> ModelConfig:
    """The same, and which scheduler its checkpoint has, where that can be read here. Raises as `read_settings`."""
    try:
        index = read_index(fetch_configs(model.layout, revision=model.revision))
    except FileNotFoundError:
        return model
    return model.with_own_scheduler(index["scheduler"][1]) if "scheduler" in component_names(index) else model


def stage_components(index: ModelIndex, family: Family, stage: Stage) -> frozenset[str]:
    """Names of the components that `stage` needs."""
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
    """Schedulers and guiders: every stage has its own."""
    return frozenset(name for name in component_names(index) if name == "scheduler" or name.endswith("guider"))


def denoiser_names(index: ModelIndex) -> tuple[str, ...]:
    """The components that the denoise stage has, in the order of the index: most checkpoints have one, Wan 2.2 has
    an expert for high noise and one for low.

    Of diffusers' models those that are no VAE, no scheduler and no guider: told by their classes' names.
    """
    components = component_names(index)
    models = (name for name in index if name in components and index[name][0] == "diffusers")
    return tuple(name for name in models if not any(part in index[name][1] for part in _NO_DENOISERS))


def needed_names(index: ModelIndex) -> frozenset[str]:
    """Denoisers and settings that are set: a pipeline that does not know them all would draw with half a model, as
    WanVideoToVideoPipeline would with one of Wan 2.2's two experts."""
    settings = {n for n, value in index.items() if value and not n.startswith("_") and not _is_component(value)}
    return frozenset({*denoiser_names(index), *settings})


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
    made = {"scheduler"} if is_modular(index) else set[str]()  # blocks bring what they need beside weights
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


def _is_component(entry: Any) -> bool:
    """Settings may be lists, too."""
    return isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)

"""Loads a diffusers pipeline with only some of its components."""

from collections.abc import Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from deployments.checkpoints.components import DECODERS, VAES, ModelIndex, component_names, left_out
from deployments.checkpoints.modular import is_modular
from deployments.checkpoints.packages import import_class, library_of
from deployments.checkpoints.processors import is_processor, load_processor
from deployments.checkpoints.weights import find_variants
from deployments.config.stage import StageConfig
from deployments.engine.blocks import build_skeleton
from deployments.engine.shard import check_complete
from deployments.memory.device import resolve_device, resolve_dtype
from deployments.memory.quantize import plan_stage_quantization
from deployments.stages.modular import build_modular
from deployments.stages.stub import ModelStub

_ENCODERS = ("text_encoder", "image_encoder", "connectors")
"""Prefixes of the component names of encoders."""


def load_pipeline(
    folder: Path,
    index: ModelIndex,
    keep: frozenset[str],
    config: StageConfig,
    *,
    variant: str | None,
    held: Mapping[str, nn.Module] | None = None,
) -> Any:
    """Loads the checkpoint's own pipeline class with the components named in `keep`.

    Other denoisers and VAEs are replaced by stubs with their configs, from which the pipeline computes sizes. All
    other components are None, such as safety checkers, which no stage has.

    held: models that another checkpoint's pipeline has loaded and that this one is to share.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # their warnings are about calls that diffusers itself makes
    absent: dict[str, Any] = dict.fromkeys((component_names(index) - keep) | left_out(index))
    known = dict(_known_models(folder, index, frozenset(absent)))
    if "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    names = sorted(name for name in keep if name.startswith(_ENCODERS) or name in DECODERS)
    quantized: dict[str, Any] = {}
    if config.quantization is not None and names and held is None:
        quantized = plan_stage_quantization(config.quantization, config.dtype, index, names)
    models = {
        name: _load_model(folder / name, index[name], resolve_dtype(config.dtype), variant, quantized.get(name))
        if held is None
        else held[name]
        for name in names
    }
    processors = {n: load_processor(folder / n, index[n][1]) for n in sorted(keep) if is_processor(index[n])}
    given = absent | known | models | processors
    if is_modular(index):
        pipe: Any = build_modular(folder, index, given)
    else:
        # DiffusionPipeline's own method takes Wan's optional transformer for a setting, and would always load it.
        pipeline_class = getattr(diffusers, index["_class_name"], diffusers.DiffusionPipeline)
        pipe = pipeline_class.from_pretrained(folder, **given, local_files_only=True)
    for name, face in known.items():
        build = partial(build_skeleton, type(face), folder, name)
        setattr(pipe, name, ModelStub(face, build, resolve_dtype(config.dtype), resolve_device(config)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_model(
    folder: Path, entry: tuple[str, str], dtype: torch.dtype, variant: str | None, quantization: Any
) -> nn.Module:
    """Loads a model as its pipeline would, but raises ValueError instead of filling missing weights at random."""
    library, class_name = library_of(entry[0]), entry[1]
    options: dict[str, Any] = {"dtype": dtype, "variant": variant, "quantization_config": quantization}
    if variant not in find_variants(folder, library):
        del options["variant"]
    if quantization is None:
        del options["quantization_config"]
    if library == "transformers":
        options["ignore_mismatched_sizes"] = True  # or its error would not name them
    model, keys = import_class(entry).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    check_complete(keys["missing_keys"], folder, class_name)
    if keys["mismatched_keys"]:
        name, stored, needed = sorted(keys["mismatched_keys"])[0]
        raise ValueError(
            f"{folder}: {name} has the shape {list(stored)}, but {class_name} needs {list(needed)}: config.json "
            "describes another model; fetch the checkpoint again"
        )
    loaded: nn.Module = model
    return loaded


def _known_models(folder: Path, index: ModelIndex, names: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the diffusers models among `names` whose configs are present."""
    for name in names & component_names(index):
        library, class_name = index[name]
        model_class = getattr(diffusers, class_name, None) if library == "diffusers" else None
        if not isinstance(model_class, type) or not issubclass(model_class, ModelMixin):
            continue
        if (folder / name / "config.json").is_file():
            # Pipelines read more of a VAE than its config, and it is small. A denoiser takes up to 2 s to build.
            if name in VAES:
                yield name, _with_buffers(build_skeleton(model_class, folder, name), folder / name)
            else:
                yield name, _build_face(model_class, folder, name)


def _with_buffers(skeleton: nn.Module, folder: Path) -> nn.Module:
    """Fills buffers from the model's files, if these are present: LTX's pipeline reads two buffers of its VAE."""
    wanted = {name for name, _ in skeleton.named_buffers()} & skeleton.state_dict().keys()
    for file in folder.glob("*.safetensors") if wanted else ():
        with safe_open(file, "pt") as weights:
            for name in wanted & set(weights.keys()):
                skeleton.get_buffer(name).data = weights.get_tensor(name)
    return skeleton


def _build_face(model_class: Any, folder: Path, subfolder: str) -> nn.Module:
    """Builds an instance of the model's class with its config, but without modules."""
    parameters = signature(model_class.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not Parameter.empty}
    config = model_class.load_config(folder, subfolder=subfolder, local_files_only=True)
    face: nn.Module = model_class.__new__(model_class)
    nn.Module.__init__(face)
    model_class.register_to_config(face, **defaults | config)
    return face


def loaded_models(pipe: Any) -> dict[str, nn.Module]:
    """Returns the pipeline's models by component name."""
    return {name: part for name, part in pipe.components.items() if issubclass(type(part), nn.Module)}

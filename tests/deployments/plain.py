"""Whole diffusers pipelines, classic and modular, loaded from checkpoints in diffusers' layout."""

from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline

from deployments.checkpoints.components import component_names, read_index
from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.modular import MODULAR_INDEX, is_modular
from deployments.checkpoints.processors import is_processor, load_processor


def load_plain(folder: Path) -> Any:
    """Loads a pipeline with all its components. Plain diffusers fails where a processor needs torchvision."""
    index = read_index(folder)
    processors = {
        part: load_processor(folder / part, index[part][1])
        for part in component_names(index)
        if is_processor(index[part])
    }
    if is_modular(index):
        pipeline = _load_modular(folder, processors)
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder, **processors)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **arguments: Any) -> tuple[Any, Any]:
    """Returns (images or videos, sound or None) of one call of either kind of pipeline."""
    if isinstance(pipeline, ModularPipeline):
        drawn = next(name for name in pipeline.blocks.output_names if name in ("images", "videos"))
        return pipeline(**arguments, output=drawn), None
    output = pipeline(**arguments)
    return output[0], getattr(output, "audio", None)


def latents_of(pipeline: Any, **arguments: Any) -> torch.Tensor:
    """Returns the latents that the call passes to its VAE's `decode`."""
    pipeline.vae.decode = _reach
    try:
        pipeline(**arguments)
    except _Reached as reached:
        return reached.latents
    finally:
        del pipeline.vae.decode
    raise AssertionError("nothing was decoded")


class _Reached(BaseException):
    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__(latents)
        self.latents = latents


def _reach(latents: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
    raise _Reached(latents)


def _load_modular(folder: Path, processors: dict[str, Any]) -> Any:
    """Loads it as its documentation says for prompts that are encoded unchanged: without the upsampler's block."""
    told = read_json(folder / MODULAR_INDEX)
    blocks = getattr(diffusers, told["_blocks_class_name"])()
    blocks.sub_blocks.pop("prompt_upsampler", None)
    pipeline = getattr(diffusers, told["_class_name"])(blocks=blocks, pretrained_model_name_or_path=str(folder))
    there = set(pipeline.pretrained_component_names) & component_names(read_index(folder))
    pipeline.load_components(sorted(there - processors.keys()))
    pipeline.update_components(**processors)
    return pipeline

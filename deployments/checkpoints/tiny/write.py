"""Writes tiny checkpoints: seeded, complete, and saved by the pipelines' own `save_pretrained`."""

import importlib
import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from deployments.checkpoints.modular import MODULAR_INDEX
from deployments.checkpoints.tiny.names import TINY_MODULES

_SEED = 0
_JITTER_STD = 0.05
_WEIGHT_GAIN = 1.5
_DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")


def write_tiny_checkpoint(name: str, out_dir: Path) -> None:
    """Writes a seeded checkpoint in diffusers' layout; the bytes are the same on every call.

    Denoisers are stored in bfloat16, to be small; text encoders and the VAE in float32, because transformers loads
    in the stored dtype, whereas diffusers loads in float32. The folder is built beside `out_dir` and renamed, so
    it is never incomplete.

    Raises:
        ValueError: `name` is not in `TINY_MODULES`.
        FileExistsError: `out_dir` is a file, or a folder with something in it.
    """
    if name not in TINY_MODULES:
        raise ValueError(f"no tiny checkpoint for family {name!r}; choose one of: {', '.join(TINY_MODULES)}")
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder; remove it or name another folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as building:
        checkpoint = Path(building) / out_dir.name
        pipeline = _build_pipeline(name)
        if isinstance(pipeline, ModularPipeline):
            pipeline.save_pretrained(str(checkpoint), overwrite_modular_index=True)
            _forget_folder(checkpoint / MODULAR_INDEX)
        else:
            pipeline.save_pretrained(checkpoint)
        os.rename(checkpoint, out_dir)


def _forget_folder(index: Path) -> None:
    """Removes from a modular index the folder that each component was written to, because it is renamed."""
    told = json.loads(index.read_text())
    for entry in told.values():
        if isinstance(entry, list):
            entry[2]["pretrained_model_name_or_path"] = None
    index.write_text(json.dumps(told, indent=2) + "\n")


def _build_pipeline(name: str) -> DiffusionPipeline | ModularPipeline:
    """Builds the pipeline under a private seed, so the caller's random state stays as it was."""
    module = importlib.import_module(f"deployments.checkpoints.tiny.{TINY_MODULES[name]}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        pipeline = getattr(module, f"build_{name.replace('-', '_')}")()
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                _jitter_constants(component)
    denoisers = [pipeline.components[part] for part in _DENOISERS if pipeline.components.get(part) is not None]
    for model in (*denoisers, pipeline.vae):
        _amplify(model)
    for parameter in (parameter for model in denoisers for parameter in model.parameters()):
        parameter.data = parameter.data.to(torch.bfloat16)  # not model.to(): diffusers would log advice on loading
    return pipeline


@torch.no_grad()
def _jitter_constants(module: nn.Module) -> None:
    """Adds noise to every parameter whose values are all equal (zero output layers, biases, norm weights).

    A zeroed layer gives zero whatever reaches it, and a norm weight left at its default looks like a loaded
    one: with either, a test for equality could pass on a wrong model.
    """
    for parameter in module.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=_JITTER_STD)


@torch.no_grad()
def _amplify(module: nn.Module) -> None:
    """Scales matrices and kernels up: at torch's defaults a prompt changes no 8-bit pixel of Qwen-Image."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(_WEIGHT_GAIN)

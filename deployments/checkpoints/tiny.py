"""Tiny, random, complete checkpoints: tests and a first look at the cluster need no download."""

import os
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from deployments.checkpoints.tiny_pipelines import TINY_PIPELINES

TINY_FAMILIES: tuple[str, ...] = tuple(TINY_PIPELINES)

_SEED = 0
_JITTER_STD = 0.05
_WEIGHT_GAIN = 1.5


def write_tiny_checkpoint(family: str, out_dir: Path) -> None:
    """Writes a seeded checkpoint of `family` in diffusers' layout; equal bytes on every call.

    The denoiser is stored in bfloat16, to be small; text encoders and VAE in float32, because transformers
    loads in the stored dtype where diffusers loads in float32. The folder appears whole or not at all: it is
    built beside `out_dir` and renamed.

    Raises:
        ValueError: `family` is not in `TINY_FAMILIES`.
        FileExistsError: `out_dir` is a file, or a folder with something in it.
    """
    if family not in TINY_PIPELINES:
        raise ValueError(f"no tiny checkpoint for family {family!r}; choose one of: {', '.join(TINY_FAMILIES)}")
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder; remove it or name another folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as building:
        checkpoint = Path(building) / out_dir.name
        _build_pipeline(family).save_pretrained(checkpoint)
        os.rename(checkpoint, out_dir)


def _build_pipeline(family: str) -> DiffusionPipeline:
    """Builds the pipeline under a private seed, so the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        pipeline = TINY_PIPELINES[family]()
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                _jitter_constants(component)
    denoiser: nn.Module = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    _amplify(denoiser)
    _amplify(pipeline.vae)
    for parameter in denoiser.parameters():  # not denoiser.to(): diffusers would log advice about loading
        parameter.data = parameter.data.to(torch.bfloat16)
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
    """Scales matrices and kernels up: at torch's defaults a prompt moves no 8-bit pixel of Qwen-Image."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(_WEIGHT_GAIN)

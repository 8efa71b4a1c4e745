"""Estimates of the memory that a loaded stage's next call needs: the same call runs on the meta device."""

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.blocks import block_bytes, build_skeleton
from deployments.engine.load import Denoisers, cut_blocks
from deployments.engine.merge import Inputs
from deployments.engine.parallel import sliced, working_share
from deployments.families import Geometry
from deployments.memory.config import MemoryConfig
from deployments.memory.device import resolve_dtype
from deployments.memory.resident import device_bytes
from deployments.memory.stored import as_stored, dequantized_bytes, stored_models
from deployments.memory.tiling import set_tiles
from deployments.memory.working import META, to_meta, working_bytes
from deployments.request import MediaSize

log = logging.getLogger("ray.serve")


class ForwardMemoryEstimator:
    """Estimates the memory of the denoisers' forwards, on the rank that holds most."""

    def __init__(self, denoisers: Denoisers, config: TransformerConfig) -> None:
        self._skeletons, self._config = denoisers.skeletons, config
        self._model = cache(lambda component: _model(self._skeletons[component], config))
        self._weights = cache(self._weights_bytes)

    def __call__(self, component: str, inputs: Inputs) -> tuple[int, int]:
        """Returns bytes of all denoisers' weights on the device, and of tensors in one forward of these inputs."""
        model = self._model(component)
        run = partial(model, **to_meta(inputs), return_dict=False)
        working = working_share(estimate_working(model, run), self._config.context_parallel)
        return self._weights() + dequantized_bytes(model, self._config), working

    def _weights_bytes(self) -> int:
        stored = stored_models(self._skeletons, self._config)
        on_device = device_bytes(stored, self._config)
        if self._config.num_ranks == self._config.context_parallel:
            return on_device
        shards = [
            [blocks.of_shard(*rank) for rank in cut_blocks(blocks, self._config)]
            for blocks in (block_bytes(sliced(model, self._config.tensor_parallel)) for model in stored.values())
        ]
        return min(on_device, max(map(sum, zip(*shards, strict=True))))


class DecodeMemoryEstimator:
    """Estimates the memory of a VAE's decode. Ignores a video's sound, which takes a thousandth of it."""

    def __init__(self, classes: Mapping[str, Any], folder: Path, config: VaeConfig, geometry: Geometry) -> None:
        """classes: the classes of all models of the stage, by component name."""
        self._geometry = geometry
        skeletons = {name: build_skeleton(of, folder, name) for name, of in classes.items()}
        self._dtype, self._model = resolve_dtype(config.dtype), _model(skeletons["vae"], config)
        self._weights = device_bytes(stored_models(skeletons, config), config)
        if config.slicing:
            self._model.enable_slicing()
        if config.tiling is not None:
            set_tiles(self._model, config.tiling)

    def __call__(self, size: MediaSize) -> tuple[int, int]:
        """Returns bytes of weights on the device, and of tensors in the decode of one image or video."""
        latents, *_ = decode_inputs(self._model.config, self._geometry, size, self._dtype)
        run = partial(self._model.decode, latents)
        return self._weights, estimate_working(self._model, run)


def decode_inputs(
    vae_config: Mapping[str, Any], of: Geometry, size: MediaSize, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Returns the latents of each `vae.decode` call, the largest first: [1, C, H, W] for an image, [1, C, F, H, W]
    for a video VAE, [F, C, H, W] for an image VAE that gets some frames of a video at a time."""
    sides = (size.height // of.latent_pixels, size.width // of.latent_pixels)
    shapes: list[tuple[int, ...]]
    if of.frames_per_decode is not None:
        begins = range(0, size.num_frames, of.frames_per_decode)
        batches = [min(of.frames_per_decode, size.num_frames - begin) for begin in begins]
        shapes = [(batch, of.latent_channels, *sides) for batch in batches]
    elif "z_dim" in vae_config or of.num_frames > 1:
        shapes = [(1, of.latent_channels, (size.num_frames - 1) // of.frame_stride + 1, *sides)]
    else:
        shapes = [(1, of.latent_channels, *sides)]
    return [torch.empty(shape, dtype=dtype, device=META) for shape in shapes]


def _model(skeleton: nn.Module, config: MemoryConfig) -> Any:
    return as_stored(skeleton, config, is_quantized=False).to(META)


def estimate_working(model: nn.Module, run: Callable[[], Any]) -> int:
    """Returns `working_bytes`; 0 for a model that cannot run without its tensors' values, or without its GPU."""
    try:
        return working_bytes(model, run)
    except Exception as error:  # kernels of other packages may raise anything
        log.warning("the working memory of %s is not known before it runs: %s", type(model).__name__, error)
        return 0

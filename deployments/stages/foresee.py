"""What a loaded stage's next call will need, told by the same call on the meta device: no weights, no GPU."""

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deployments.config import TransformerConfig, VaeConfig
from deployments.device import resolve_dtype
from deployments.engine.blocks import block_bytes, build_skeleton
from deployments.engine.load import Denoisers, cut_ranks
from deployments.engine.merge import Inputs
from deployments.engine.parallel import sliced, working_share
from deployments.families import Geometry
from deployments.memory.config import MemoryConfig
from deployments.memory.resident import device_bytes
from deployments.memory.stored import as_stored, dequantized_bytes, stored_models
from deployments.memory.tiling import set_tiles
from deployments.memory.working import META, to_meta, working_bytes
from deployments.request import MediaSize

log = logging.getLogger("ray.serve")


class ForwardForesight:
    """Of the denoisers' forwards, on whichever rank holds most."""

    def __init__(self, denoisers: Denoisers, config: TransformerConfig) -> None:
        self._skeletons, self._config = denoisers.skeletons, config
        self._model = cache(lambda component: _model(self._skeletons[component], config))
        self._weights = cache(self._weights_bytes)

    def __call__(self, component: str, inputs: Inputs) -> tuple[int, int]:
        """(bytes of all denoisers' weights on the device, bytes of tensors in one forward of these inputs)"""
        model = self._model(component)
        run = partial(model, **to_meta(inputs), return_dict=False)
        working = working_share(foresee_working(model, run), self._config.context_parallel)
        return self._weights() + dequantized_bytes(model, self._config), working

    def _weights_bytes(self) -> int:
        stored = stored_models(self._skeletons, self._config)
        on_device = device_bytes(stored, self._config)
        if self._config.num_ranks == self._config.context_parallel:
            return on_device
        shards = [
            [blocks.of_shard(*rank) for rank in cut_ranks(blocks, self._config)]
            for blocks in (block_bytes(sliced(model, self._config.tensor_parallel)) for model in stored.values())
        ]
        return min(on_device, max(map(sum, zip(*shards, strict=True))))


class DecodeForesight:
    """Of a VAE's decode. A video's sound takes a thousandth of it."""

    def __init__(self, classes: Mapping[str, Any], folder: Path, config: VaeConfig, geometry: Geometry) -> None:
        """classes: of all models of the stage, by component name."""
        self._geometry = geometry
        skeletons = {name: build_skeleton(of, folder, name) for name, of in classes.items()}
        self._dtype, self._model = resolve_dtype(config.dtype), _model(skeletons["vae"], config)
        self._weights = device_bytes(stored_models(skeletons, config), config)
        if config.slicing:
            self._model.enable_slicing()
        if config.tiling is not None:
            set_tiles(self._model, config.tiling)

    def __call__(self, size: MediaSize) -> tuple[int, int]:
        """(bytes of weights on the device, bytes of tensors in the decode of one picture or video)"""
        latents, *_ = decode_inputs(self._model.config, self._geometry, size, self._dtype)
        run = partial(self._model.decode, latents)
        return self._weights, foresee_working(self._model, run)


def decode_inputs(
    vae_config: Mapping[str, Any], of: Geometry, size: MediaSize, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What `vae.decode` takes, call by call: [1, C, H, W], or [1, C, F, H, W] of the VAEs that know time, or, of
    those that do not, [F, C, H, W] of some frames; the most first."""
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


def foresee_working(model: nn.Module, run: Callable[[], Any]) -> int:
    """`working_bytes`; 0 of what cannot run without its tensors' values, or off its GPU."""
    try:
        return working_bytes(model, run)
    except Exception as error:  # kernels of other packages raise what they like
        log.warning("the working memory of %s is not known before it runs: %s", type(model).__name__, error)
        return 0

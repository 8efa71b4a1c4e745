"""Latents to pixels."""

from functools import partial

import numpy as np
import torch

from deployments.checkpoints.components import fetch_stage, stage_components
from deployments.config import ModelConfig, VaeConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.share import take_share
from deployments.memory.tiling import set_tiles
from deployments.request import GenerationRequest
from deployments.stages.foresee import DecodeForesight
from deployments.stages.media import MEDIA_TYPES, Frames, encode_media
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.warm_up import WarmUp


class Decoding:
    """The checkpoint's VAE."""

    def __init__(self, model: ModelConfig, config: VaeConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._family = model.architecture
        folder, index = fetch_stage(model, "decode")
        keep = stage_components(index, self._family, "decode")
        self._device = resolve_device(config)
        share = take_share(config, self._device)
        with turn_to_load(config, self._device), share.naming():
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
            vae = self._pipe.vae
            dtype = self._family.vae_dtype(config.dtype, vae.config)
            self._dtype = resolve_dtype(dtype)
            if dtype != config.dtype:
                config = config.model_copy(update={"dtype": dtype})
                vae.to(self._dtype)
            own = []
            if config.slicing:
                vae.enable_slicing()
                own.append("slicing")
            if config.tiling is not None:
                set_tiles(vae, config.tiling)
                own.append(f"tiling: {config.tiling.tile_size or 'as the VAE has it'}")
            self.keeper = Keeper(loaded_models(self._pipe), config, self._device, own=own, share=share)
        self._foresee: DecodeForesight | None = None
        if self.keeper.needs.is_limited:
            self._foresee = DecodeForesight(type(self._pipe.vae), folder, config)

    def warm_up(self, warm_up: WarmUp) -> None:
        """Blank latents of every size, to files."""
        for request in warm_up.requests:
            self.decode_media(torch.zeros(self._family.latents_shape(self._pipe, request)), request)

    def check(self, request: GenerationRequest) -> None:
        """Raises NeverFits. Thread-safe; takes up to seconds the first time for a size."""
        if self._foresee is not None:
            size = request.size
            self.keeper.needs.at_most(size, f"decoding {size}", partial(self._foresee, size))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, request: GenerationRequest) -> Frames:
        """Latents as the pipeline returns them -> uint8 [F, H, W, 3], F = 1 for a picture. Raises NeverFits."""
        self.check(request)
        try:
            with self.keeper.at_work(), self.keeper.needs.measured(request.size):
                return self._decode(latents, request)
        finally:
            self.keeper.release()

    def _decode(self, latents: torch.Tensor, request: GenerationRequest) -> Frames:
        """What lay on the device for it is free again; frames leave it one by one, for float pixels are large."""
        latents = latents.to(self._device, self._dtype)
        latents = self._family.unscale(self._pipe, latents, request.height, request.width)
        pixels = self._pipe.vae.decode(latents, return_dict=False)[0]
        frames = pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels  # [F, C, H, W]
        return np.concatenate([self._to_uint8(frame) for frame in frames.split(1)])

    def _to_uint8(self, frame: torch.Tensor) -> Frames:
        """By the pipeline's own processor, [1, C, H, W] -> [1, H, W, C]."""
        processor = getattr(self._pipe, "video_processor", None) or self._pipe.image_processor
        rounded: Frames = (processor.postprocess(frame, output_type="np") * 255).round().astype(np.uint8)
        return rounded

    def decode_media(self, latents: torch.Tensor, request: GenerationRequest) -> tuple[bytes, str]:
        """The request's file and its media type: encoded where it is decoded."""
        data = encode_media(
            self.decode(latents, request),
            request.output_format,
            compression=request.output_compression,
            fps=request.fps,
        )
        return data, MEDIA_TYPES[request.output_format]

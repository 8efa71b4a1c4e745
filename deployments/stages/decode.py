"""Latents to pixels."""

import numpy as np
import torch

from deployments.checkpoints.components import fetch_stage, stage_components
from deployments.config import ModelConfig, VaeConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.families import FAMILIES
from deployments.request import GenerationRequest
from deployments.stages.media import MEDIA_TYPES, Frames, encode_media
from deployments.stages.pipeline import load_pipeline


class Decoding:
    """The checkpoint's VAE."""

    def __init__(self, model: ModelConfig, family: str, config: VaeConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._family = FAMILIES[family]
        folder, index = fetch_stage(model, self._family, "decode")
        keep = stage_components(index, self._family, "decode")
        dtype = resolve_dtype(config.dtype)
        self._pipe = load_pipeline(folder, index, keep, dtype=dtype, variant=model.variant)
        if dtype == torch.float16 and self._pipe.vae.config.get("force_upcast"):
            self._pipe.vae.to(torch.float32)  # as the SDXL pipeline does: this VAE overflows in float16
        self._pipe.to(resolve_device(config))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, request: GenerationRequest) -> Frames:
        """Latents as the pipeline returns them -> uint8 [F, H, W, 3], F = 1 for a picture."""
        vae = self._pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        latents = self._family.unscale(self._pipe, latents, request.height, request.width)
        pixels = vae.decode(latents, return_dict=False)[0]
        if self._family.media == "video":
            frames = self._pipe.video_processor.postprocess_video(pixels, output_type="np")[0]
        else:
            pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
            frames = self._pipe.image_processor.postprocess(pixels, output_type="np")
        rounded: Frames = (frames * 255).round().astype(np.uint8)
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

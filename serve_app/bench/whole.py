"""The hardest simple baseline: the whole plain pipeline in one Serve replica, one request after another."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.device import resolve_device, resolve_dtype
from deployments.request import GenerationRequest
from serve_app.app import build_validator
from serve_app.config import AppConfig


class PlainPipeline:
    """The checkpoint's pipeline in this process, prompt to PNG, by the same defaults as the served app."""

    def __init__(self, config: AppConfig) -> None:
        torch.set_num_threads(config.transformer.num_threads)
        self._validator = build_validator(config)
        self._max_sequence_length = config.encoder.max_sequence_length
        model = config.model
        folder = fetch_checkpoint(model.checkpoint, (), revision=model.revision, variant=model.variant)
        dtype, device = resolve_dtype(config.transformer.dtype), resolve_device(config.transformer)
        self._pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype, variant=model.variant).to(device)
        self._pipe.set_progress_bar_config(disable=True)

    def draw(self, **fields: Any) -> bytes:
        """The fields of an HTTP body in, a PNG out."""
        [request] = self._validator.requests(fields)
        file = io.BytesIO()
        self._pipe(**self._arguments(request)).images[0].save(file, "png", compress_level=1)
        return file.getvalue()

    def _arguments(self, request: GenerationRequest) -> dict[str, Any]:
        family = self._validator.family
        length = self._max_sequence_length or family.max_sequence_length
        return {
            "prompt": request.prompt.text,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            **family.call(request),
            **({} if length is None else {"max_sequence_length": length}),
        }


class WholePipeline:
    """A Serve deployment of it."""

    def __init__(self, config: AppConfig) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pipeline = PlainPipeline(config)

    async def generate(self, **fields: Any) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._pipeline.draw(**fields))

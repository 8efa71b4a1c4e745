"""The hardest simple baseline: the whole plain pipeline in one Serve replica, one request after another."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.device import resolve_device, resolve_dtype
from deployments.stages.call import call_arguments
from serve_app.app import build_validator
from serve_app.config import AppConfig


class PlainPipeline:
    """The checkpoint's pipeline in this process, prompt to PNG, by the same defaults as the served app."""

    def __init__(self, config: AppConfig) -> None:
        [served] = config.served
        model, encoder, transformer = served.model, served.encoder, served.transformer
        torch.set_num_threads(transformer.num_threads)
        self._validator = build_validator(config)
        self._max_sequence_length = encoder.max_sequence_length
        folder = fetch_checkpoint(model.checkpoint, (), revision=model.revision, variant=model.variant)
        dtype, device = resolve_dtype(transformer.dtype), resolve_device(transformer)
        self._pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype, variant=model.variant).to(device)
        self._pipe.set_progress_bar_config(disable=True)

    def draw(self, **fields: Any) -> bytes:
        """The fields of an HTTP body in, a PNG out."""
        [request] = self._validator.requests(fields)
        file = io.BytesIO()
        length = self._max_sequence_length or self._validator.family.max_sequence_length
        arguments = call_arguments(type(self._pipe), request, length) | {"output_type": "pil"}
        self._pipe(**arguments).images[0].save(file, "png", compress_level=1)
        return file.getvalue()


class WholePipeline:
    """A Serve deployment of it."""

    def __init__(self, config: AppConfig) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pipeline = PlainPipeline(config)

    async def generate(self, **fields: Any) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._pipeline.draw(**fields))

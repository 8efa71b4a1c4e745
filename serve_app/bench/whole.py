"""The strongest simple baselines: the whole plain pipeline, in one process or in Serve replicas."""

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from ray import serve
from starlette.requests import Request

from deployments.checkpoints.source import fetch_checkpoint
from deployments.memory.device import resolve_device, resolve_dtype
from deployments.stages.call_arguments import call_arguments
from serve_app.app import build_validator
from serve_app.config.app import AppConfig

Fields = dict[str, Any]
"""Fields of an HTTP body."""
Placement = Literal["device", "cpu_offload", "device_map"]
MAX_BATCH_SIZE = 8
BATCH_WAIT_S = 0.02
"""Time for clients that were answered together to send their next requests; negligible beside an image's."""


class PlainPipeline:
    """The checkpoint's pipeline in this process, from prompt to PNG, with the same defaults as the served app."""

    def __init__(self, config: AppConfig, placement: Placement = "device") -> None:
        [served] = config.served
        model, encoder, transformer = served.model, served.encoder, served.transformer
        torch.set_num_threads(transformer.num_threads)
        self._validator = build_validator(config)
        self._max_sequence_length = encoder.max_sequence_length
        folder = fetch_checkpoint(model.checkpoint, (), revision=model.revision, variant=model.variant)
        dtype, device = resolve_dtype(transformer.dtype), resolve_device(transformer)
        placed = {"device_map": "balanced"} if placement == "device_map" else {}
        self._pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype, variant=model.variant, **placed)
        if placement == "device":
            self._pipe = self._pipe.to(device)
        elif placement == "cpu_offload":
            self._pipe.enable_model_cpu_offload()
        self._pipe.set_progress_bar_config(disable=True)

    def draw(self, **fields: Any) -> bytes:
        """Generates one image and returns it as PNG."""
        return _png(self._pipe(**self._arguments(fields)).images[0])

    def draw_together(self, bodies: Sequence[Fields]) -> list[bytes]:
        """Returns PNGs. Bodies that differ in prompt and seed only share one call of the pipeline."""
        groups: dict[str, list[int]] = {}
        for index, body in enumerate(bodies):
            alike = {name: value for name, value in body.items() if name not in ("prompt", "seed")}
            groups.setdefault(json.dumps(alike, sort_keys=True), []).append(index)
        pictures = [b""] * len(bodies)
        for indices in groups.values():
            each = [self._arguments(bodies[index]) for index in indices]
            names = {"prompt", "negative_prompt", "generator"} & each[0].keys()
            lists = {name: [of[name] for of in each] for name in names}
            images = self._pipe(**each[0] | lists).images
            for index, image in zip(indices, images, strict=True):
                pictures[index] = _png(image)
        return pictures

    def _arguments(self, fields: Fields) -> dict[str, Any]:
        [request] = self._validator.requests(fields)
        length = self._max_sequence_length or self._validator.family.max_sequence_length
        return call_arguments(type(self._pipe), request, length) | {"output_type": "pil"}


class WholePipeline:
    """A Serve deployment of the plain pipeline that runs one request after another."""

    def __init__(self, config: AppConfig) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pipeline = PlainPipeline(config)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Takes a body of OpenAI's image API and returns its answer."""
        picture = await self.generate(**await request.json())
        return {"data": [{"b64_json": base64.b64encode(picture).decode()}]}

    async def generate(self, **fields: Any) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._pipeline.draw(**fields))


class BatchingPipeline(WholePipeline):
    """Runs waiting requests as one batch, from the first step to the last."""

    async def generate(self, **fields: Any) -> bytes:
        picture: bytes = await self._together(fields)
        return picture

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)  # type: ignore[untyped-decorator]
    async def _together(self, bodies: list[Fields]) -> list[bytes]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._pipeline.draw_together, bodies)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)
    return file.getvalue()

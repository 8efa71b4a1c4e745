"""The decode stage's deployment: latents in, an encoded picture or video out."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cluster.metrics import StageMetrics, export_regularly
from deployments.config import ModelConfig, VaeConfig
from deployments.request import GenerationRequest, Media
from deployments.stages import load_stage
from deployments.stats import VaeStats

if TYPE_CHECKING:
    import torch


class Vae:
    """Serves `decode`, one request at a time: a VAE's peak of memory is its own worst neighbour."""

    def __init__(self, model: ModelConfig, family: str, config: VaeConfig) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._stage = load_stage("decode", model, family, config)
        self._num_decoded = 0
        metrics = StageMetrics(stage="decode", rank=0, model=model.name)
        export_regularly(lambda: metrics.export({"relay_requests_total": self._num_decoded}))

    async def decode(self, latents: "torch.Tensor", request: GenerationRequest) -> Media:
        """The picture or video that the latents stand for, in the request's format."""
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        data, media_type = await loop.run_in_executor(self._thread, self._stage.decode_media, latents, request)
        self._num_decoded += 1
        return Media(data, media_type, (time.perf_counter() - start) * 1e3)

    async def ping(self) -> None:
        """Answers when this replica can serve."""

    async def stats(self) -> VaeStats:
        return VaeStats(os.getpid(), self._num_decoded)

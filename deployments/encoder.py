"""The encode stage's deployment: prompts in, embeddings out, repeated prompts from memory."""

import asyncio
import os
import time
from typing import TYPE_CHECKING

from cluster.metrics import StageMetrics, export_regularly
from deployments.config import EncoderConfig, ModelConfig
from deployments.embedding_cache import EmbeddingCache, num_bytes
from deployments.lane import Lane
from deployments.refusal import raised_in
from deployments.replica import StageReplica
from deployments.request import Conditioning, Prompt
from deployments.stages import load_stage
from deployments.stats import EncoderStats
from deployments.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.families.family import Embeds
    from deployments.memory.keeper import Keeper


class Encoder(StageReplica):
    """Serves `encode`. One thread encodes: tokenizers are not thread-safe."""

    def __init__(self, model: ModelConfig, config: EncoderConfig, warm_up: WarmUp = NO_WARM_UP) -> None:
        super().__init__()
        began = time.perf_counter()
        self._lane = Lane("encode")
        self._stage = load_stage("encode", model, config)
        self._lane.run_first(self._stage.warm_up, warm_up)
        self._cache = EmbeddingCache(int(config.cache_mib * 2**20))
        self._running: dict[Prompt, asyncio.Future[Embeds]] = {}
        self._num_forwards = self._num_cache_hits = self._answered_bytes = 0
        self._metrics = StageMetrics(stage="encode", rank=0, model=model.name)
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    @property
    def keeper(self) -> "Keeper":
        return self._stage.keeper

    async def encode(self, prompt: Prompt) -> Conditioning:
        """The prompt's embeddings. Equal prompts at the same time share one forward."""
        start = time.perf_counter()
        with raised_in("encode"), self._metrics.request():
            embeds = self._cache.get(prompt)
            self._num_cache_hits += embeds is not None
            if embeds is None:
                embeds = await self._encode_once(prompt)
        self._answered_bytes += num_bytes(embeds)
        return Conditioning(embeds, (time.perf_counter() - start) * 1e3)

    async def _encode_once(self, prompt: Prompt) -> "Embeds":
        future = self._running.get(prompt)
        if future is None:
            self._num_forwards += 1
            future = self._lane.run(self.guarded(self._stage.encode), prompt)
            self._running[prompt] = future
            future.add_done_callback(lambda _: self._running.pop(prompt))
        embeds = await asyncio.shield(future)  # a client that leaves must not cancel it for the others
        self._cache.put(prompt, embeds)
        return embeds

    def _export(self) -> None:
        self._metrics.export_requests()
        self._metrics.export(
            {
                "relay_forwards_total": self._num_forwards,
                "relay_cache_hits_total": self._num_cache_hits,
                "relay_queue_wait_seconds_total": self._lane.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
                "relay_cached_bytes": self._cache.num_bytes,
                "relay_not_finite_total": self._stage.finite.num_refused,
                "relay_cold_start_seconds": self._cold_start_s,
                **self._stage.keeper.stats().metrics(),
            }
        )

    async def ping(self) -> None:
        """Answers when this replica can serve."""

    async def stats(self) -> EncoderStats:
        return EncoderStats(
            os.getpid(),
            self._stage.keeper.stats(),
            self._metrics.num_in_flight,
            self._num_forwards,
            self._num_cache_hits,
            num_cached=len(self._cache),
            cached_bytes=self._cache.num_bytes,
        )

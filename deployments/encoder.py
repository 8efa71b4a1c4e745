"""The encode stage's deployment: texts in, embeddings out, repeated texts from memory."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.metrics import StageMetrics, export_regularly
from deployments.config import EncoderConfig, ModelConfig
from deployments.lane import BatchLane
from deployments.refusal import raised_in
from deployments.replica import StageReplica
from deployments.request import Conditioning, Encoded, GenerationRequest, InputPictures, num_bytes
from deployments.stages import load_stage
from deployments.stats import EncoderStats
from deployments.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.memory.keeper import Keeper

Asked = tuple[GenerationRequest, InputPictures | None]


class Encoder(StageReplica):
    """Serves `encode`. What waits is encoded together; one thread at a time: tokenizers are not thread-safe."""

    def __init__(self, model: ModelConfig, config: EncoderConfig, warm_up: WarmUp = NO_WARM_UP) -> None:
        super().__init__()
        began = time.perf_counter()
        self._lane = BatchLane[Asked, Encoded]("encode", self._encode, config.batch_size)
        self._stage = load_stage("encode", model, config)
        self._lane.run_first(self._stage.warm_up, warm_up)
        self._num_cache_hits = self._answered_bytes = 0
        self._metrics = StageMetrics(stage="encode", rank=0, model=model.name)
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    @property
    def keeper(self) -> "Keeper":
        return self._stage.keeper

    async def encode(self, request: GenerationRequest, pictures: InputPictures | None = None) -> Conditioning:
        """The embeddings of the request's texts, and of pictures where its encoders see them.

        Texts that wait at the same time share forwards, equal ones wholly.
        """
        start = time.perf_counter()
        with raised_in("encode"), self._metrics.request():
            encoded = await asyncio.to_thread(self._stage.recall, request, pictures)
            self._num_cache_hits += encoded is not None
            if encoded is None:
                encoded = await self._lane.ask((request, pictures))
            self._answered_bytes += num_bytes(encoded.encodings)
        return Conditioning(encoded.encodings, (time.perf_counter() - start) * 1e3, encoded.warnings)

    def _encode(self, asked: Sequence[Asked]) -> Sequence[Encoded | Exception]:
        """In the lane."""
        outcomes = self.guarded(self._stage.encode_together)(asked)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                self._exit_if_device_lost(outcome)
        return outcomes

    @property
    def _num_hits(self) -> int:
        return self._num_cache_hits + self._stage.num_shared

    def _export(self) -> None:
        self._metrics.export_requests()
        self._metrics.export_batch_sizes(dict(self._stage.batch_sizes))
        self._metrics.export(
            {
                "relay_forwards_total": self._stage.num_forwards,
                "relay_cache_hits_total": self._num_hits,
                "relay_queue_wait_seconds_total": self._lane.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
                "relay_cached_bytes": self._stage.cache.num_bytes,
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
            self._stage.num_forwards,
            self._num_hits,
            dict(self._stage.batch_sizes),
            num_cached=len(self._stage.cache),
            cached_bytes=self._stage.cache.num_bytes,
        )

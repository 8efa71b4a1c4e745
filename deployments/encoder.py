"""The encode stage's deployment: encodes texts into embeddings; repeated texts come from a cache."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.metrics import StageMetrics, export_regularly
from deployments.answers import Conditioning, Encoded, num_bytes
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.errors import raised_in
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.replica.lifecycle import StageReplica
from deployments.replica.pace import executor_pace
from deployments.replica.serial_executor import BatchingExecutor
from deployments.replica.sharing import load_sharing
from deployments.request import GenerationRequest, InputPictures
from deployments.stages import load_stage
from deployments.stages.stats import EncoderStats
from deployments.stages.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.memory.residency import WeightResidency
    from deployments.stages.encode import TextEncoding

Asked = tuple[GenerationRequest, InputPictures | None]


class Encoder(StageReplica):
    """Serves `encode`. Waiting requests are encoded together, in one thread, as tokenizers are not thread-safe."""

    def __init__(
        self,
        model: ModelConfig,
        config: EncoderConfig,
        warm_up: WarmUp = NO_WARM_UP,
        sharing: Sequence[tuple[ModelConfig, WarmUp]] = (),
    ) -> None:
        """sharing: other models with the same text encoders, each with its warm-up."""
        super().__init__()
        began = time.perf_counter()
        self._executor = BatchingExecutor[Asked, Encoded]("encode", self._encode, config.batch_size)
        self._stages: dict[str | None, TextEncoding] = load_sharing(
            lambda served, owner: load_stage("encode", served, config, owner),
            model,
            warm_up,
            sharing,
            self._executor.run_blocking,
        )
        self._stage = self._stages[model.name]
        self._num_cache_hits = self._answered_bytes = 0
        self._metrics = StageMetrics(stage="encode", rank=0, model=model.name)
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    @property
    def residency(self) -> "WeightResidency":
        return self._stage.residency

    async def encode(
        self, request: GenerationRequest, pictures: InputPictures | None = None, qos: Qos = DEFAULT_QOS
    ) -> Conditioning:
        """Returns the embeddings of the request's texts, and of its images if the encoders use these.

        Texts that wait at the same time share forwards; equal texts are encoded once.
        """
        start = time.perf_counter()
        with raised_in("encode"), self._metrics.request():
            encoded = await asyncio.to_thread(self._stage_of(request).recall, request, pictures)
            self._num_cache_hits += encoded is not None
            if encoded is None:
                encoded = await self._executor.submit((request, pictures), qos)
            self._answered_bytes += num_bytes(encoded.encodings)
        return Conditioning(encoded.encodings, (time.perf_counter() - start) * 1e3, encoded.warnings)

    def _stage_of(self, request: GenerationRequest) -> "TextEncoding":
        return self._stages.get(request.model, self._stage)

    def _encode(self, asked: Sequence[Asked]) -> Sequence[Encoded | Exception]:
        """Encodes requests, one model after another. Runs in the executor's thread."""
        made: dict[int, Encoded | Exception] = {}
        for stage in self._stages.values():
            mine = [i for i, (request, _) in enumerate(asked) if self._stage_of(request) is stage]
            if mine:
                outcomes = self.guarded(stage.encode_together)([asked[i] for i in mine])
                made |= dict(zip(mine, outcomes, strict=True))
        for outcome in made.values():
            if isinstance(outcome, Exception):
                self._exit_if_device_lost(outcome)
        return [made[i] for i in range(len(asked))]

    @property
    def _num_hits(self) -> int:
        return self._num_cache_hits + sum(stage.num_shared for stage in self._stages.values())

    @property
    def _num_forwards(self) -> int:
        return sum(stage.num_forwards for stage in self._stages.values())

    @property
    def _batch_sizes(self) -> dict[int, int]:
        return dict(sum((Counter(stage.batch_sizes) for stage in self._stages.values()), Counter()))

    def _export(self) -> None:
        self._metrics.export_requests()
        self._metrics.export_batch_sizes(self._batch_sizes)
        self._metrics.export(
            {
                "relay_forwards_total": self._num_forwards,
                "relay_cache_hits_total": self._num_hits,
                "relay_queue_wait_seconds_total": self._executor.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
                "relay_cached_bytes": self._stage.cache.num_bytes,
                "relay_not_finite_total": sum(of.finite.num_refused for of in self._stages.values()),
                "relay_cold_start_seconds": self._cold_start_s,
                **self._stage.residency.stats().metrics(),
            }
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns figures that Serve passes to the autoscaling policy."""
        return executor_pace(self._executor, self._metrics, self._cold_start_s)

    async def ping(self) -> None:
        """Answers when this replica can serve."""

    async def stats(self) -> EncoderStats:
        return EncoderStats(
            os.getpid(),
            self._stage.residency.stats(),
            self._metrics.num_in_flight,
            self._num_forwards,
            self._num_hits,
            self._batch_sizes,
            num_cached=len(self._stage.cache),
            cached_bytes=self._stage.cache.num_bytes,
        )

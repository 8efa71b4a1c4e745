"""The denoise stage's deployment: embeddings in, latents out, progress on the way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.autoscaling import LOAD
from cluster.meeting import listen, meeting_point
from cluster.metrics import StageMetrics, export_regularly
from cluster.place import num_nodes
from cluster.shard_group import ShardGroup, this_address
from deployments.config import ModelConfig, TransformerConfig
from deployments.news import News
from deployments.rank import Rank
from deployments.replica import StageReplica, exit_replica
from deployments.request import (
    NO_NEWS,
    NOTHING_PREPARED,
    Conditioning,
    DecodeArguments,
    Denoised,
    GenerationRequest,
    InputPictures,
    PartialDenoised,
    Prepared,
    Progress,
    StreamOptions,
)
from deployments.stages import load_stage
from deployments.stats import TransformerStats
from deployments.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.engine.seat import Seat
    from deployments.memory.keeper import Keeper

log = logging.getLogger("ray.serve")


class Transformer(StageReplica):
    """Serves `denoise`: every request in a thread of its own, all on one engine.

    With several shards this process is rank 0, and its children, in its placement group, are the others.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, warm_up: WarmUp = NO_WARM_UP) -> None:
        super().__init__()
        began = time.perf_counter()
        self._threads = ThreadPoolExecutor(config.max_ongoing_requests, thread_name_prefix="denoise")
        self._group: ShardGroup | None = None
        listening = listen(this_address()) if config.parallel_degree > 1 else None
        if config.num_ranks > 1:  # first of all: the children start while this process imports torch
            meeting = None if listening is None else meeting_point(listening)
            self._group = ShardGroup(Rank, config.num_ranks, config, model, config, meeting)
        self._stage = load_stage("denoise", model, config, listening)
        self._connect()
        self._stage.warm_up(warm_up)
        self._answered_bytes = self._reused_forwards = 0
        self._metrics = [
            StageMetrics(stage="denoise", rank=rank, model=model.name) for rank in range(config.num_ranks)
        ]
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    def _connect(self) -> None:
        if self._group is None:
            self._stage.connect(None, exit_replica)
            return
        if self._stage.adapters is not None:
            self._stage.adapters.ask_ranks = self._group.ask
        places = self._group.places()
        if num_nodes(places) > 1:
            log.warning(
                "no node had room for %d shards: they lie on %d, and every step crosses the network between them",
                len(places),
                num_nodes(places),
            )
        rendezvous = self._stage.open_rendezvous(this_address(), places)
        self._group.connect(rendezvous, partial(self._stage.connect, rendezvous, exit_replica), exit_replica)

    @property
    def keeper(self) -> "Keeper":
        return self._stage.loaded.keeper

    async def denoise(
        self,
        conditioning: Conditioning,
        request: GenerationRequest,
        options: StreamOptions = NO_NEWS,
        prepared: Prepared = NOTHING_PREPARED,
        pictures: InputPictures | None = None,
    ) -> AsyncIterator[Progress | PartialDenoised | Denoised | DecodeArguments]:
        """prepared: the decode stage's, of `pictures`.

        Yields what options ask for (Progress a few times a second), then Denoised, then what is to be decoded.

        DecodeArguments, of partial pictures too, come alone and are announced by the item before them, so that the
        caller may hand on their reference without reading them.
        A caller that stops listening cancels the request at its next step.
        """
        news = News(request.num_inference_steps, options, partial(self._metrics[0].observe, "relay_step_seconds"))
        seat = self._stage.join()
        try:
            with self._metrics[0].request():
                running = asyncio.get_running_loop().run_in_executor(
                    self._threads,
                    self.guarded(self._denoise),
                    seat,
                    (conditioning, prepared, pictures),
                    request,
                    options,
                    news,
                )
                running.add_done_callback(news.on_end)
                while (items := await news.next()) is not None:
                    for item in items:
                        yield item
                arguments = await running
        finally:
            self._stage.leave(seat)
        self._answered_bytes += arguments.nbytes
        self._reused_forwards += news.forwards.asked - news.forwards.computed
        yield Denoised(
            conditioning.encode_ms,
            prepared.prepare_ms,
            queue_ms=news.queue_ms,
            denoise_ms=news.denoise_ms,
            forwards=news.forwards,
        )
        yield arguments

    def _denoise(
        self,
        seat: "Seat",
        given: tuple[Conditioning, Prepared, InputPictures | None],
        request: GenerationRequest,
        options: StreamOptions,
        news: News,
    ) -> DecodeArguments:
        """In the request's thread."""
        news.on_start()
        conditioning, prepared, pictures = given
        return self._stage.denoise(
            seat,
            conditioning.encodings,
            request,
            news.on_step,
            options.num_partial_images,
            news.on_partial,
            posteriors=prepared.posteriors,
            pictures=pictures,
            on_forwards=news.on_forwards,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks, and gives it to the autoscaling policy."""
        return {LOAD: self._stage.load}

    async def stats(self) -> TransformerStats:
        """Of this replica and all of its ranks."""
        return await asyncio.to_thread(self._stats)

    def _stats(self) -> TransformerStats:
        stats = self._stage.stats()
        others = [] if self._group is None else self._group.stats()
        return replace(stats, ranks=(*stats.ranks, *others))

    def _export(self) -> None:
        """Here for all ranks: only rank 0 knows how long the ring was occupied."""
        stats = self._stats()
        queue = stats.queue
        for rank, metrics in zip(stats.ranks, self._metrics, strict=True):
            metrics.export(
                {
                    "relay_micro_batches_total": rank.num_micro_batches,
                    "relay_compute_seconds_total": rank.compute_s,
                    "relay_bubble_seconds_total": stats.occupied_s - rank.compute_s,
                    "relay_sent_bytes_total": rank.bytes_sent,
                    **rank.memory.metrics(),
                }
            )
        forwards = sum(size * number for size, number in queue.batch_sizes.items())
        self._metrics[0].export_requests()
        self._metrics[0].export(
            {
                "relay_forwards_total": forwards,
                "relay_reused_forwards_total": self._reused_forwards,
                "relay_waiting_forwards": queue.num_waiting,
                "relay_queue_wait_seconds_total": queue.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
                "relay_not_finite_total": self._stage.finite.num_refused,
                "relay_cold_start_seconds": self._cold_start_s,
            }
        )
        self._metrics[0].export_batch_sizes(queue.batch_sizes)

    async def ping(self) -> None:
        """Answers when this replica can serve."""

    def __del__(self) -> None:
        """Serve calls it at an orderly end; the ring's goodbye ends the other ranks' part in it."""
        if hasattr(self, "_stage"):
            self._stage.close()

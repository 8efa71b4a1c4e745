"""The denoise stage's deployment: turns embeddings into latents, and reports progress meanwhile."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.metrics import StageMetrics, export_regularly
from cluster.ranks.place import num_nodes
from cluster.ranks.shard_group import ShardGroup, this_address
from cluster.ranks.store_address import listen, store_address
from deployments.answers import (
    NOTHING_PREPARED,
    Conditioning,
    DecodeArguments,
    Denoised,
    JournalPart,
    PartialDenoised,
    Prepared,
    Progress,
    StepsSaved,
)
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.admission_queue import num_threads
from deployments.engine.demand import Demand
from deployments.errors import NotBegun
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.options.resume import UnsavedPart
from deployments.replica.lifecycle import StageReplica, exit_replica
from deployments.replica.pace import ReplicaPace
from deployments.replica.rank import Rank
from deployments.replica.request_events import RequestEvents
from deployments.request import NO_EVENTS, GenerationRequest, InputPictures, StreamOptions
from deployments.stages import load_stage
from deployments.stages.stats import TransformerStats
from deployments.stages.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    import torch

    from deployments.engine.seat import Seat
    from deployments.memory.residency import WeightResidency

log = logging.getLogger("ray.serve")

START_TIMEOUT_S = 10.0
"""Seconds a request waits to start before the router chooses again (only with several replicas)."""


class Transformer(StageReplica):
    """Serves `denoise`: each request runs in a thread of its own, all on one engine.

    With several shards this process is rank 0; its child actors, in its placement group, are the other ranks.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, warm_up: WarmUp = NO_WARM_UP) -> None:
        super().__init__()
        began = time.perf_counter()
        self._threads = ThreadPoolExecutor(num_threads(config.max_ongoing_requests), thread_name_prefix="denoise")
        self._start_timeout_s = START_TIMEOUT_S if config.most_replicas > 1 else None
        self._group: ShardGroup | None = None
        listening = listen(this_address()) if config.parallel_degree > 1 else None
        if config.num_ranks > 1:  # first, so that the children start while this process imports torch
            store = None if listening is None else store_address(listening)
            self._group = ShardGroup(Rank, config.num_ranks, config, model, config, store)
        self._stage = load_stage("denoise", model, config, listening)
        self._connect()
        self._stage.warm_up(warm_up)
        self._answered_bytes = self._reused_forwards = 0
        self._pace = ReplicaPace()
        self._saved_bytes = self._resumed_requests = self._resumed_forwards = 0
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
                "no node had room for all %d shards: they are on %d nodes, and every step crosses the network "
                "between them",
                len(places),
                num_nodes(places),
            )
        rendezvous = self._stage.open_rendezvous(this_address(), places)
        self._group.connect(rendezvous, partial(self._stage.connect, rendezvous, exit_replica), exit_replica)

    @property
    def residency(self) -> "WeightResidency":
        return self._stage.loaded.residency

    async def denoise(
        self,
        conditioning: Conditioning,
        request: GenerationRequest,
        options: StreamOptions = NO_EVENTS,
        prepared: Prepared = NOTHING_PREPARED,
        pictures: InputPictures | None = None,
        journal_url: str | None = None,
        *journal: JournalPart,
        qos: Qos = DEFAULT_QOS,
    ) -> AsyncIterator[Progress | PartialDenoised | Denoised | DecodeArguments | StepsSaved | JournalPart]:
        """
        Args:
            prepared: the decode stage's answer for `pictures`.
            journal_url: where files keep the request's journal; the request resumes from the parts that are there.
                None: the caller keeps the journal.
            journal: the parts that the caller kept of an earlier call, which was lost.

        Yields the events that `options` select (Progress a few times a second) and, if the caller keeps the
        journal, each part of it; then Denoised, then the DecodeArguments.

        DecodeArguments, those of partial images too, and JournalPart come alone and are announced by the item
        before them, so that the caller may pass on their reference without reading them.
        A caller that stops iterating cancels the request at its next step.

        The method is long because an async generator that delegates yields to another may leave that one open.
        """
        events = RequestEvents(
            request.num_inference_steps, options, partial(self._metrics[0].observe, "relay_step_seconds")
        )
        seat = self._stage.join(Demand.of(request, qos, journal[-1].num_steps if journal else 0))
        self._pace.join(events)
        try:
            with self._metrics[0].request():
                await self._begin(seat)
                given = (conditioning, prepared, pictures)
                running = asyncio.get_running_loop().run_in_executor(
                    self._threads,
                    partial(
                        self.guarded(self._denoise), seat, given, request, options, events, journal_url, journal
                    ),
                )
                running.add_done_callback(events.on_end)
                while (items := await events.next()) is not None:
                    for item in items:
                        if not isinstance(item, UnsavedPart):
                            yield item
                            continue
                        part = await asyncio.to_thread(self._save, item, journal_url)
                        if part is not None:
                            yield StepsSaved(part.num_steps)
                            yield part
                        item.is_saved = True
                arguments = await running
        finally:
            self._stage.leave(seat)
            self._pace.leave(events)
        self._count(events, arguments)
        yield Denoised(
            conditioning.encode_ms,
            prepared.prepare_ms,
            queue_ms=events.queue_ms,
            denoise_ms=events.denoise_ms,
            forwards=events.forwards,
            warnings=conditioning.warnings,
        )
        yield arguments

    def _count(self, events: RequestEvents, arguments: DecodeArguments) -> None:
        self._answered_bytes += arguments.nbytes
        self._reused_forwards += events.forwards.asked - events.forwards.computed
        self._resumed_forwards += events.num_resumed
        self._resumed_requests += events.num_resumed > 0

    async def _begin(self, seat: "Seat") -> None:
        """Waits for the request's turn. Raises NotBegun after a while if there are other replicas to take it."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await asyncio.wrap_future(self._stage.engine.queue.enter(seat))
        except TimeoutError as error:
            raise NotBegun(f"in {self._start_timeout_s:g} s") from error

    def _denoise(
        self,
        seat: "Seat",
        given: tuple[Conditioning, Prepared, InputPictures | None],
        request: GenerationRequest,
        options: StreamOptions,
        events: RequestEvents,
        journal_url: str | None,
        journal: tuple[JournalPart, ...],
    ) -> DecodeArguments:
        """Denoises in the request's thread."""
        events.on_start()
        if journal_url is not None:
            journal = self._stage.read_journal(journal_url)
        conditioning, prepared, pictures = given

        def on_step(num_done: int, latents: "torch.Tensor") -> None:
            self._stage.engine.queue.advance(seat, num_done)
            events.on_step(num_done, latents)

        return self._stage.denoise(
            seat,
            conditioning.encodings,
            request,
            on_step,
            options.num_partial_images,
            events.on_partial,
            posteriors=prepared.posteriors,
            pictures=pictures,
            on_forwards=events.on_forwards,
            on_resumed=events.on_resumed,
            journal=journal,
            on_part=events.on_part,
        )

    def _save(self, unsaved: UnsavedPart, journal_url: str | None) -> JournalPart | None:
        """Reads a journal part, in a thread. Returns it if the caller keeps it; None: it is in its file."""
        part = unsaved.read()
        self._saved_bytes += part.nbytes
        if journal_url is None:
            return part
        self._stage.write_part(journal_url, part)
        return None

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns figures that Serve passes to the autoscaling policy."""
        return self._pace.tell(self._stage.load, self._cold_start_s)

    async def stats(self) -> TransformerStats:
        """Returns figures of this replica and all of its ranks."""
        return await asyncio.to_thread(self._stats)

    def _stats(self) -> TransformerStats:
        stats = self._stage.stats()
        others = [] if self._group is None else self._group.stats()
        return replace(stats, ranks=(*stats.ranks, *others))

    def _export(self) -> None:
        """Exports the metrics of all ranks, because only rank 0 knows how long the ring was occupied."""
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
                "relay_resumed_requests_total": self._resumed_requests,
                "relay_resumed_forwards_total": self._resumed_forwards,
                "relay_saved_bytes_total": self._saved_bytes,
                "relay_waiting_forwards": queue.num_waiting,
                "relay_waiting_requests": queue.num_waiting_requests,
                "relay_out_of_time_total": queue.num_out_of_time,
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
        """Closes the stage, and thereby the other ranks' part of the ring. Serve calls it at an orderly end."""
        if hasattr(self, "_stage"):
            self._stage.close()

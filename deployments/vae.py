"""The decode stage's deployment: decodes latents into an encoded image or video; partial images have to wait.

Before the denoise stage, it prepares a request's input images.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.metrics import StageMetrics, export_regularly
from cluster.replicas.sibling_replicas import SiblingReplicas
from deployments.answers import Conditioning, DecodeArguments, Media, Prepared, Tile, num_bytes
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.errors import raised_in
from deployments.media.target_file import thumbnail_of, write_file
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.replica.lifecycle import StageReplica
from deployments.replica.pace import executor_pace
from deployments.replica.serial_executor import SerialExecutor
from deployments.replica.sharing import load_sharing
from deployments.request import GenerationRequest, InputPictures
from deployments.stages import load_stage
from deployments.stages.stats import VaeStats
from deployments.stages.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.memory.residency import WeightResidency
    from deployments.stages.decode import Decoding

log = logging.getLogger("ray.serve")

TILES_AT_ONCE = 2
"""Most tiles of other replicas that a replica has at once: while it decodes one, the next is sent."""
MOST_PEERS = 8
"""Most replicas that decode tiles of one decode; a thread waits for each of their tiles."""
TILE_TIMEOUT_S = 60.0
"""How long a thread waits for another replica; by then the tile has long been decoded here."""


class Vae(StageReplica):
    """Serves `prepare`, `decode` and `decode_partial`, one at a time: two decodes at once could exceed the memory.

    An image waits for at most one partial image, the one that is being decoded.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: VaeConfig,
        warm_up: WarmUp = NO_WARM_UP,
        sharing: Sequence[tuple[ModelConfig, WarmUp]] = (),
    ) -> None:
        """sharing: other models with the same VAE, each with its warm-up."""
        super().__init__()
        began = time.perf_counter()
        self._executor = SerialExecutor("decode")
        self._num_pictures = self._num_partial = self._num_written = 0
        self._max_partial = config.max_ongoing_requests // 2
        self._no_picture_waits, self._partial_turn = asyncio.Event(), asyncio.Lock()
        self._no_picture_waits.set()
        self._version = hashlib.sha256((model.model_dump_json() + config.model_dump_json()).encode()).hexdigest()
        self._num_tiles_here = self._num_tiles = 0
        self._stages: dict[str | None, Decoding] = load_sharing(
            lambda served, owner: load_stage("decode", served, config, owner),
            model,
            warm_up,
            sharing,
            self._executor.run_blocking,
        )
        self._stage = self._stages[model.name]
        if config.spreads_tiles:
            self._siblings = SiblingReplicas("decode_tile", timeout_s=TILE_TIMEOUT_S)
            for stage in self._stages.values():
                stage.spread_tiles(self._ask_peer, TILES_AT_ONCE * min(config.most_replicas - 1, MOST_PEERS))
        self._num_decoded = self._answered_bytes = 0
        self._metrics = StageMetrics(stage="decode", rank=0, model=model.name)
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    @property
    def residency(self) -> "WeightResidency":
        return self._stage.residency

    async def check(self, request: GenerationRequest) -> None:
        """Raises ExceedsMemory if the image or video could never be decoded here. Does not wait for decodes."""
        await asyncio.to_thread(self._stage_of(request).check, request)

    def _stage_of(self, request: GenerationRequest) -> "Decoding":
        return self._stages.get(request.model, self._stage)

    async def prepare(
        self,
        conditioning: Conditioning,
        request: GenerationRequest,
        pictures: InputPictures,
        qos: Qos = DEFAULT_QOS,
    ) -> Prepared:
        """Returns what the denoise stage needs of the input images. Images seen lately are not computed again."""
        start = time.perf_counter()
        with raised_in("prepare"), self._metrics.request():
            posteriors = await self._executor.run(
                self.guarded(self._stage_of(request).prepare),
                conditioning.encodings,
                request,
                pictures,
                qos=qos,
                work=request.num_pixels,
            )
            self._answered_bytes += num_bytes(posteriors)
        return Prepared(posteriors, (time.perf_counter() - start) * 1e3)

    async def decode(
        self,
        arguments: DecodeArguments,
        request: GenerationRequest,
        target: str | None = None,
        qos: Qos = DEFAULT_QOS,
    ) -> Media:
        """Returns the image or video that the pipeline would decode from these, in the request's format.

        target: where to write it, so that its bytes are not returned through Ray.
        """
        self._num_pictures += 1
        self._no_picture_waits.clear()
        try:
            with self._metrics.request():
                media = await self._decode(arguments, request, qos)
        finally:
            self._num_pictures -= 1
            if not self._num_pictures:
                self._no_picture_waits.set()
        self._num_decoded += 1
        if target is not None:
            media = await self._written(media, target)
        self._answered_bytes += len(media.data)
        return media

    async def _written(self, media: Media, target: str) -> Media:
        """Writes media to the target; returns it unchanged if that fails here, so that the caller may try."""
        media = await asyncio.to_thread(self._with_thumbnail, media)
        try:
            if media.thumbnail is not None:
                await asyncio.to_thread(write_file, thumbnail_of(target), media.thumbnail)
            is_written = await asyncio.to_thread(write_file, target, media.data)
        except Exception as error:  # object stores may raise anything
            log.warning("%s cannot be written: %s: %s", target, type(error).__name__, error)
            return media
        if not is_written:
            return media
        self._num_written += 1
        still = None if media.thumbnail is None else b""
        return replace(media, data=b"", thumbnail=still, num_written=len(media.data))

    def _with_thumbnail(self, media: Media) -> Media:
        if media.media_type != "video/mp4":
            return media
        try:
            return replace(media, thumbnail=self._stage.thumbnail(media.data))
        except Exception as error:  # a video without a thumbnail is better than none
            log.warning("no thumbnail: %s: %s", type(error).__name__, error)
            return media

    async def decode_partial(self, arguments: DecodeArguments, request: GenerationRequest) -> Media | None:
        """Like `decode`, but waits until no image waits. Returns None if too many partial images wait already."""
        if self._num_partial >= self._max_partial:
            return None
        self._num_partial += 1
        try:
            async with self._partial_turn:
                await self._no_picture_waits.wait()
                return await self._decode(arguments, request, DEFAULT_QOS)
        finally:
            self._num_partial -= 1

    async def decode_tile(self, tile: Tile, version: str) -> tuple[Any, ...] | None:
        """Decodes a tile for another replica. Returns None if this one has work of its own, or another version.

        So if all replicas spread tiles, they refuse each other's, and each decodes its own.
        """
        is_busy = self._executor.num_calls > self._num_tiles_here or self._num_tiles_here >= TILES_AT_ONCE
        if is_busy or version != self._version:
            return None
        self._num_tiles_here += 1
        try:
            outputs = await self._executor.run(self.guarded(self._stage.decode_tile), tile)
        finally:
            self._num_tiles_here -= 1
        self._num_tiles += 1
        return outputs

    def _ask_peer(self, tile: Tile) -> tuple[Any, ...] | None:
        """Lets another replica decode a tile; None: none does. Called in a thread of a decode."""
        outputs: tuple[Any, ...] | None = self._siblings.ask(tile, self._version)
        return outputs

    async def _decode(self, arguments: DecodeArguments, request: GenerationRequest, qos: Qos) -> Media:
        start = time.perf_counter()
        data, media_type = await self._executor.run(
            self.guarded(self._stage_of(request).decode_media),
            arguments,
            request,
            qos=qos,
            work=request.num_pixels,
        )
        return Media(data, media_type, (time.perf_counter() - start) * 1e3)

    def _export(self) -> None:
        self._metrics.export_requests()
        self._metrics.export(
            {
                "relay_queue_wait_seconds_total": self._executor.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
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

    async def stats(self) -> VaeStats:
        return VaeStats(
            os.getpid(),
            self._stage.residency.stats(),
            self._num_pictures,
            self._num_decoded,
            self._num_tiles,
            self._num_written,
        )

"""The decode stage's deployment: latents in, an encoded picture or video out; partial pictures come second.

Before the denoise it prepares the pictures that go in.
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
from cluster.peers import Peers
from deployments.config import ModelConfig, VaeConfig
from deployments.lane import Lane
from deployments.refusal import raised_in
from deployments.replica import StageReplica
from deployments.request import (
    Conditioning,
    DecodeArguments,
    GenerationRequest,
    InputPictures,
    Media,
    Prepared,
    Tile,
    num_bytes,
)
from deployments.stages import load_stage
from deployments.stats import VaeStats
from deployments.target_file import write_file
from deployments.warm_up import NO_WARM_UP, WarmUp

if TYPE_CHECKING:
    from deployments.memory.keeper import Keeper
    from deployments.stages.decode import Decoding

log = logging.getLogger("ray.serve")

TILES_AT_ONCE = 2
"""That a replica has of others: while it decodes one, the next is on its way."""
TILE_TIMEOUT_S = 60.0
"""After which the thread that waits for another replica gives up; its tile was decoded here long before."""


class Vae(StageReplica):
    """Serves `prepare`, `decode` and `decode_partial`, one at a time: a VAE's peak is its own worst neighbour.

    A picture waits for at most one partial picture, the one that is being decoded.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: VaeConfig,
        warm_up: WarmUp = NO_WARM_UP,
        sharing: Sequence[tuple[ModelConfig, WarmUp]] = (),
    ) -> None:
        """sharing: other models that have the same VAE, each with its warm-up."""
        super().__init__()
        began = time.perf_counter()
        self._lane = Lane("decode")
        self._num_pictures = self._num_partial = self._num_written = 0
        self._max_partial = config.max_ongoing_requests // 2
        self._no_picture_waits, self._partial_turn = asyncio.Event(), asyncio.Lock()
        self._no_picture_waits.set()
        self._version = hashlib.sha256((model.model_dump_json() + config.model_dump_json()).encode()).hexdigest()
        self._num_tiles_here = self._num_tiles = 0
        self._stage = load_stage("decode", model, config)
        self._stages: dict[str | None, Decoding] = {model.name: self._stage}
        for other, _ in sharing:
            self._stages[other.name] = load_stage("decode", other, config, (model, self._stage))
        for name, warm_up_of in ((model.name, warm_up), *((other.name, of) for other, of in sharing)):
            self._lane.run_first(self._stages[name].warm_up, warm_up_of)
        if config.spreads_tiles:
            self._peers = Peers("decode_tile", timeout_s=TILE_TIMEOUT_S)
            for stage in self._stages.values():
                stage.spread_tiles(self._ask_peer, TILES_AT_ONCE * (config.max_replicas - 1))
        self._num_decoded = self._answered_bytes = 0
        self._metrics = StageMetrics(stage="decode", rank=0, model=model.name)
        self._cold_start_s = time.perf_counter() - began
        export_regularly(self._export)

    @property
    def keeper(self) -> "Keeper":
        return self._stage.keeper

    async def check(self, request: GenerationRequest) -> None:
        """Raises NeverFits if the picture or video could never be decoded here. Beside what is being decoded."""
        await asyncio.to_thread(self._stage_of(request).check, request)

    def _stage_of(self, request: GenerationRequest) -> "Decoding":
        return self._stages.get(request.model, self._stage)

    async def prepare(
        self, conditioning: Conditioning, request: GenerationRequest, pictures: InputPictures
    ) -> Prepared:
        """What the denoise stage needs of the pictures that go in. Of one seen lately nothing is computed."""
        start = time.perf_counter()
        with raised_in("prepare"), self._metrics.request():
            posteriors = await self._lane.run(
                self.guarded(self._stage_of(request).prepare), conditioning.encodings, request, pictures
            )
            self._answered_bytes += num_bytes(posteriors)
        return Prepared(posteriors, (time.perf_counter() - start) * 1e3)

    async def decode(
        self, arguments: DecodeArguments, request: GenerationRequest, target: str | None = None
    ) -> Media:
        """The picture or video that the pipeline would decode with these, in the request's format.

        target: where to write it, so that its bytes take no other way.
        """
        self._num_pictures += 1
        self._no_picture_waits.clear()
        try:
            with self._metrics.request():
                media = await self._decode(arguments, request)
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
        """As it is, if the target cannot be reached from here: whoever asked may try."""
        try:
            is_written = await asyncio.to_thread(write_file, target, media.data)
        except Exception as error:  # object stores raise what they like
            log.warning("%s cannot be written: %s: %s", target, type(error).__name__, error)
            return media
        if not is_written:
            return media
        self._num_written += 1
        return replace(media, data=b"", num_written=len(media.data))

    async def decode_partial(self, arguments: DecodeArguments, request: GenerationRequest) -> Media | None:
        """Like `decode`, once no picture waits; None if so many do that they would keep pictures out."""
        if self._num_partial >= self._max_partial:
            return None
        self._num_partial += 1
        try:
            async with self._partial_turn:
                await self._no_picture_waits.wait()
                return await self._decode(arguments, request)
        finally:
            self._num_partial -= 1

    async def decode_tile(self, tile: Tile, version: str) -> tuple[Any, ...] | None:
        """Of what another replica decodes. None: it has work of its own, or is of another version than this one.

        So replicas that all spread refuse each other, and each decodes what is its own.
        """
        is_busy = self._lane.num_calls > self._num_tiles_here or self._num_tiles_here >= TILES_AT_ONCE
        if is_busy or version != self._version:
            return None
        self._num_tiles_here += 1
        try:
            outputs = await self._lane.run(self.guarded(self._stage.decode_tile), tile)
        finally:
            self._num_tiles_here -= 1
        self._num_tiles += 1
        return outputs

    def _ask_peer(self, tile: Tile) -> tuple[Any, ...] | None:
        """In a thread of a decode."""
        outputs: tuple[Any, ...] | None = self._peers.ask(tile, self._version)
        return outputs

    async def _decode(self, arguments: DecodeArguments, request: GenerationRequest) -> Media:
        start = time.perf_counter()
        data, media_type = await self._lane.run(
            self.guarded(self._stage_of(request).decode_media), arguments, request
        )
        return Media(data, media_type, (time.perf_counter() - start) * 1e3)

    def _export(self) -> None:
        self._metrics.export_requests()
        self._metrics.export(
            {
                "relay_queue_wait_seconds_total": self._lane.queue_wait_s,
                "relay_answered_bytes_total": self._answered_bytes,
                "relay_not_finite_total": sum(of.finite.num_refused for of in self._stages.values()),
                "relay_cold_start_seconds": self._cold_start_s,
                **self._stage.keeper.stats().metrics(),
            }
        )

    async def ping(self) -> None:
        """Answers when this replica can serve."""

    async def stats(self) -> VaeStats:
        return VaeStats(
            os.getpid(),
            self._stage.keeper.stats(),
            self._num_pictures,
            self._num_decoded,
            self._num_tiles,
            self._num_written,
        )

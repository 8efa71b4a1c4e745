"""Partial pictures: decoded beside the denoise that they come from, which never waits for them."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.request import GenerationRequest, Media

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class PartialImage:
    """A picture that is still forming."""

    partial_image_index: int
    media: Media


class Partials:
    """The partial pictures of one picture, told in their order. One that fails, or comes too late, is left out."""

    def __init__(self, vae: Any, request: GenerationRequest, tell: Callable[[PartialImage], None]) -> None:
        self._vae, self._request, self._tell = vae, request, tell
        self._waiting: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._num_added = 0
        self._decoding: asyncio.Task[None] | None = None

    def add(self, index: int, latents: Any) -> None:
        """latents: a reference. What a repeated denoise gives once more is left out."""
        if index < self._num_added:
            return
        self._num_added = index + 1
        self._waiting.put_nowait((index, latents))
        if self._decoding is None:
            self._decoding = asyncio.create_task(self._decode())

    def drop(self) -> None:
        """Tell of no more."""
        if self._decoding is not None:
            self._decoding.cancel()

    async def _decode(self) -> None:
        while True:
            index, latents = await self._waiting.get()
            response = self._vae.decode_partial.remote(latents, self._request)
            try:
                media = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:  # whatever it is, the picture itself may still come
                log.warning("partial picture %d is left out: %s", index, type(error).__name__)
                continue
            if media is not None:
                self._tell(PartialImage(index, media))

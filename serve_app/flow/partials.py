"""Partial images: decoded while the denoise that they come from continues, which never waits for them."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.answers import Media
from deployments.request import GenerationRequest

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class PartialImage:
    """A decoded intermediate image."""

    partial_image_index: int
    media: Media


class Partials:
    """The partial images of one image, reported in order. One that fails or is too late is left out."""

    def __init__(self, vae: Any, request: GenerationRequest, tell: Callable[[PartialImage], None]) -> None:
        self._vae, self._request, self._tell = vae, request, tell
        self._waiting: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._num_added = 0
        self._decoding: asyncio.Task[None] | None = None

    def add(self, index: int, latents: Any) -> None:
        """latents: a reference. Images that a repeated denoise delivers again are left out."""
        if index < self._num_added:
            return
        self._num_added = index + 1
        self._waiting.put_nowait((index, latents))
        if self._decoding is None:
            self._decoding = asyncio.create_task(self._decode())

    def drop(self) -> None:
        """Stops reporting."""
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
            except Exception as error:  # whatever the error, the final image may still succeed
                log.warning("partial image %d is left out: %s", index, type(error).__name__)
                continue
            if media is not None:
                self._tell(PartialImage(index, media))

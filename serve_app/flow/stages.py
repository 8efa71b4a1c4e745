"""The three stages of one model, as its requests call them."""

from typing import Any

from deployments.request import (
    GenerationRequest,
    MediaSize,
)
from serve_app.errors import BadRequest, RelayError
from serve_app.flow.isolation import PoisonIsolation
from serve_app.flow.retries import StageLost, translating_errors
from serve_app.flow.wake_up import WakeUp


class Stages:
    """Serve handles of the three deployments, the isolation of poison requests, and the sizes known to fit the
    VAE."""

    def __init__(
        self, encoder: Any, transformer: Any, vae: Any, isolation: PoisonIsolation, wake_up: WakeUp | None = None
    ) -> None:
        """wake_up: for a model some of whose stages may sleep."""
        self.encoder, self.transformer, self.vae = encoder, transformer, vae
        self.isolation, self._wake_up = isolation, wake_up
        self._decodable: set[MediaSize] = set()

    @property
    def by_name(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}

    async def wake(self) -> float:
        """Waits until all stages are awake, and returns the milliseconds that took."""
        return 0.0 if self._wake_up is None else await self._wake_up.wake()

    async def refuse_early(self, request: GenerationRequest) -> None:
        """Raises BadRequest for a size that the VAE can never decode. Runs beside the denoise, not after it."""
        if request.size in self._decodable:
            return
        try:
            with translating_errors("decode", param=size_field(request)):
                await self.vae.check.remote(request)
            self._decodable.add(request.size)
        except BadRequest:
            raise
        except (RelayError, StageLost):  # if the problem persists, the decode itself will report it
            pass


def size_field(request: GenerationRequest) -> str:
    """Returns the field to blame for a request that is too large."""
    return "num_frames" if request.num_frames > 1 else "size"

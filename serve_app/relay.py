"""What an ingress does with a request once it is judged, and what it knows of its stages."""

import asyncio
import time
from dataclasses import asdict
from typing import Any

from deployments.config import ModelConfig
from deployments.request import GenerationRequest
from serve_app.config import LimitsConfig
from serve_app.errors import Overloaded, Unavailable
from serve_app.generation import OnProgress, Picture, Stages, generate
from serve_app.openai_api import ModelCard
from serve_app.validation import Validator

PING_TIMEOUT_S = 2.0
STATUS_TIMEOUT_S = 10.0


class Relay:
    """One served model: judges requests, sends them through the stages, and answers."""

    def __init__(
        self,
        model: ModelConfig,
        family: str,
        limits: LimitsConfig,
        encoder: Any,
        transformer: Any,
        vae: Any,
    ) -> None:
        self._model, self._limits = model, limits
        self._stages = Stages(encoder, transformer, vae)
        self.validator = Validator(model, family, limits)
        self._created = int(time.time())
        self._num_requests = 0

    async def run(self, requests: list[GenerationRequest], on_progress: OnProgress | None = None) -> list[Picture]:
        """Pictures in the order of their requests, which share one prompt. Raises a RelayError."""
        limit = self._limits.max_concurrent_requests
        if self._num_requests >= limit:
            raise Overloaded(f"{self._num_requests} requests are in progress; the limit is {limit}")
        self._num_requests += 1
        try:
            return await generate(
                self._stages, requests, timeout_s=self._limits.request_timeout_s, on_progress=on_progress
            )
        finally:
            self._num_requests -= 1

    def model(self) -> ModelCard:
        family = self.validator.family
        return ModelCard(id=self._model.name, created=self._created, family=family.name, media=family.media)

    async def health(self) -> dict[str, str]:
        """Per stage "ok", or why it cannot serve now. Asks the stages: Serve says RUNNING too early."""
        stages = vars(self._stages)
        return dict(zip(stages, await asyncio.gather(*map(_ping, stages.values())), strict=True))

    async def status(self) -> dict[str, Any]:
        """What one replica of every stage tells of itself. Raises Unavailable."""
        stages = vars(self._stages)
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                stats = await asyncio.gather(*(stage.stats.remote() for stage in stages.values()))
        except TimeoutError as error:
            raise Unavailable(f"a stage did not answer within {STATUS_TIMEOUT_S:g} s; see /health") from error
        return {name: asdict(of) for name, of in zip(stages, stats, strict=True)}


async def _ping(stage: Any) -> str:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await stage.ping.remote()
    except TimeoutError:
        return f"no answer within {PING_TIMEOUT_S:g} s"
    except Exception as error:  # whatever it is, this stage cannot serve
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "ok"

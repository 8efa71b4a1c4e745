"""What an ingress does with a request once it is judged, and what it knows of its stages."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from cluster.metrics import StageMetrics, export_regularly
from cluster.replica_port import follow_ray_to_loopback
from deployments.config import ModelConfig
from deployments.request import NO_NEWS, GenerationRequest, StreamOptions
from serve_app.config import LimitsConfig
from serve_app.errors import Overloaded, Unavailable
from serve_app.generation import Event, Picture, Stages, generate
from serve_app.openai_api import ModelCard, model_card
from serve_app.replicas import stage_health, stage_statuses
from serve_app.validation import Validator

STATUS_TIMEOUT_S = 10.0


class Relay:
    """One served model: judges requests, sends them through the stages, and answers."""

    def __init__(
        self,
        model: ModelConfig,
        limits: LimitsConfig,
        encoder: Any,
        transformer: Any,
        vae: Any,
    ) -> None:
        follow_ray_to_loopback()
        self._model, self._limits = model, limits
        self._stages = Stages(encoder, transformer, vae)
        self.validator = Validator(model, limits)
        self._created = int(time.time())
        self._metrics = StageMetrics(stage="ingress", rank=0, model=model.name)
        export_regularly(self._metrics.export_requests)

    async def run(self, requests: list[GenerationRequest]) -> list[Picture]:
        """Pictures in the order of their requests. Raises a RelayError."""
        pictures: dict[int, Picture] = {}
        async with aclosing(self.events(requests)) as events:
            async for event in events:
                if event is not None and isinstance(event.news, Picture):
                    pictures[event.index] = event.news
        return [pictures[i] for i in range(len(requests))]

    async def events(
        self,
        requests: list[GenerationRequest],
        options: StreamOptions = NO_NEWS,
        *,
        heartbeat_s: float | None = None,
    ) -> AsyncGenerator[Event | None, None]:
        """What happens until all pictures are there, as `generate` tells it. Raises a RelayError."""
        limit = self._limits.max_concurrent_requests
        if self._metrics.num_in_flight >= limit:
            raise Overloaded(f"{self._metrics.num_in_flight} requests are in progress; the limit is {limit}")
        with self._metrics.request():
            timeout_s = self._limits.request_timeout_s
            news = generate(self._stages, requests, options, timeout_s=timeout_s, heartbeat_s=heartbeat_s)
            async with aclosing(news) as events:
                async for event in events:
                    yield event

    def model(self) -> ModelCard:
        """What clients may want to know before they ask for a picture."""
        judge = self.validator
        return model_card(self._model, self._created, judge.family, judge.defaults, self._limits)

    async def health(self) -> dict[str, str]:
        """Per stage OK or ASLEEP, or why it cannot serve now."""
        return await stage_health(self._stages.by_name)

    async def status(self) -> dict[str, Any]:
        """What every replica of every stage tells of itself, and Serve of them. Raises Unavailable."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                statuses = await stage_statuses(self._stages.by_name)
        except TimeoutError as error:
            raise Unavailable(f"a stage did not answer within {STATUS_TIMEOUT_S:g} s; see /health") from error
        stages = {name: asdict(of) for name, of in statuses.items()}
        return {"model": self._model.name, "num_in_progress": self._metrics.num_in_flight, **stages}

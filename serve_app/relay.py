"""What an ingress does with a request once it is judged, and what it knows of its stages."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from cluster.metrics import StageMetrics, export_regularly
from deployments.config import ModelConfig
from deployments.request import NO_NEWS, GenerationRequest, StreamOptions
from serve_app.config import LimitsConfig
from serve_app.errors import Overloaded, Unavailable
from serve_app.generation import Event, Picture, Stages, generate
from serve_app.openai_api import ModelCard, ModelDefaults, ModelLimits
from serve_app.replicas import sleeping, stage_statuses
from serve_app.validation import Validator

OK, ASLEEP = "ok", "asleep"
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
        family, own, limits = self.validator.family, self.validator.defaults, self._limits
        is_video = family.media == "video"
        return ModelCard(
            id=self._model.name,
            created=self._created,
            family=family.name,
            media=family.media,
            guidance=family.guidance,
            defaults=ModelDefaults(
                size=f"{own.width}x{own.height}",
                num_inference_steps=own.num_inference_steps,
                guidance_scale=own.guidance_scale,
                true_cfg_scale=own.true_cfg_scale,
                negative_prompt=own.negative_prompt,
                num_frames=own.num_frames if is_video else None,
                fps=own.fps if is_video else None,
            ),
            limits=ModelLimits(
                size_multiple=family.size_multiple,
                max_pixels=limits.max_pixels,
                max_num_inference_steps=limits.max_num_inference_steps,
                max_prompt_characters=limits.max_prompt_characters,
                frame_stride=family.frame_stride,
                max_num_frames=limits.max_num_frames,
            ),
        )

    async def health(self) -> dict[str, str]:
        """Per stage OK or ASLEEP, or why it cannot serve now. Asks the stages: Serve says RUNNING too early."""
        stages = self._stages.by_name
        asleep = await sleeping(stages)  # they are not asked, for a call would wake them
        awake = {name: stage for name, stage in stages.items() if name not in asleep}
        answers = dict(zip(awake, await asyncio.gather(*map(_ping, awake.values())), strict=True))
        return {name: answers.get(name, ASLEEP) for name in stages}

    async def status(self) -> dict[str, Any]:
        """What every replica of every stage tells of itself, and Serve of them. Raises Unavailable."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                statuses = await stage_statuses(self._stages.by_name)
        except TimeoutError as error:
            raise Unavailable(f"a stage did not answer within {STATUS_TIMEOUT_S:g} s; see /health") from error
        stages = {name: asdict(of) for name, of in statuses.items()}
        return {"model": self._model.name, "num_in_progress": self._metrics.num_in_flight, **stages}


async def _ping(stage: Any) -> str:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await stage.ping.remote()
    except TimeoutError:
        return f"no answer within {PING_TIMEOUT_S:g} s"
    except Exception as error:  # whatever it is, this stage cannot serve
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return OK

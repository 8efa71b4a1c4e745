"""What an ingress does with a request for one model once it is judged, and what it knows of the model's stages."""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import cached_property
from typing import Any

from cluster.metrics import StageMetrics, export_regularly
from cluster.replica_port import follow_ray_to_loopback
from deployments.config import ModelConfig
from deployments.request import NO_NEWS, GenerationRequest, InputPictures, StreamOptions
from serve_app.admission import Admission
from serve_app.config import LimitsConfig
from serve_app.generation import Event, Picture, Stages, generate
from serve_app.last_seen import LastSeen, Sight
from serve_app.model_card import ModelCard, model_card
from serve_app.replicas import no_statuses, stage_health, stage_statuses
from serve_app.suspects import Suspects
from serve_app.validation import Validator
from serve_app.waking import Waking


class Relay:
    """One served model: judges requests, sends them through the stages, and answers."""

    def __init__(
        self,
        model: ModelConfig,
        limits: LimitsConfig,
        encoder: Any,
        transformer: Any,
        vae: Any,
        admission: Admission | None = None,
        turns: Collection[str] = (),
    ) -> None:
        """
        Args:
            admission: what other models of the same ingress share; None: there are none.
            turns: names of the stages that may sleep, so that other models can have their room meanwhile.
        """
        follow_ray_to_loopback()
        self._admission = admission or Admission(limits.max_concurrent_requests)
        self._model, self._limits = model, limits
        stages = {"encoder": encoder, "transformer": transformer, "vae": vae}
        waking = Waking(model.name, [stages[name] for name in turns]) if turns else None
        self._stages = Stages(**stages, suspects=Suspects(model.name), waking=waking)
        self.validator = Validator(model, limits)
        self._created = int(time.time())
        self._metrics = StageMetrics(stage="ingress", rank=0, model=model.name)
        self._health = LastSeen(lambda: stage_health(self._stages.by_name, turns))
        self._statuses = LastSeen(lambda: stage_statuses(self._stages.by_name))
        export_regularly(self._metrics.export_requests)

    async def run(self, requests: list[GenerationRequest], pictures: InputPictures | None = None) -> list[Picture]:
        """Pictures in the order of their requests. Raises a RelayError.

        pictures: that go in.
        """
        made: dict[int, Picture] = {}
        async with aclosing(self.events(requests, pictures=pictures)) as events:
            async for event in events:
                if event is not None and isinstance(event.news, Picture):
                    made[event.index] = event.news
        return [made[i] for i in range(len(requests))]

    async def events(
        self,
        requests: list[GenerationRequest],
        options: StreamOptions = NO_NEWS,
        *,
        pictures: InputPictures | None = None,
        targets: Sequence[str] | None = None,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> AsyncGenerator[Event | None, None]:
        """What happens until all pictures are there, as `generate` tells it. Raises a RelayError.

        timeout_s: in place of limits.request_timeout_s.
        """
        with self._admission.request(), self._metrics.request():
            news = generate(
                self._stages,
                requests,
                options,
                pictures,
                targets=targets,
                timeout_s=timeout_s or self._limits.request_timeout_s,
                heartbeat_s=heartbeat_s,
            )
            async with aclosing(news) as events:
                async for event in events:
                    yield event

    @property
    def name(self) -> str:
        """What clients put into `model`."""
        return self._model.name

    def model(self) -> ModelCard:
        """What clients may want to know before they ask for a picture."""
        return model_card(self._model, self._created, self._limits, self.validator.catalog.entries())

    @cached_property
    def paths(self) -> frozenset[str]:
        """Where this model is asked."""
        return frozenset(call.path for call in self.model().calls.values())

    async def health(self) -> Sight[dict[str, str]]:
        """Per stage one of replicas.SERVING, or why it cannot serve now; as last seen."""
        seen = await self._health.get()
        return seen or Sight(dict.fromkeys(self._stages.by_name, "nothing was heard of it so far"), 0.0)

    async def status(self) -> dict[str, Any]:
        """What every replica of every stage tells of itself, and Serve of them; as last seen."""
        seen = await self._statuses.get() or Sight(no_statuses(self._stages.by_name), 0.0)
        handles = self._stages.by_name
        stages = {
            name: {"deployment": handles[name].deployment_name, **asdict(of)} for name, of in seen.answer.items()
        }
        return {
            "model": self.name,
            "num_in_progress": self._metrics.num_in_flight,
            "age_s": round(seen.age_s, 3),
            **stages,
        }

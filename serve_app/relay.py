"""Handles the validated requests for one model, and knows the state of the model's stages."""

import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import cached_property
from typing import Any

from cluster.metrics import StageMetrics, export_regularly
from cluster.replicas.replica_port import follow_ray_to_loopback
from deployments.config.model import ModelConfig
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.request import NO_EVENTS, GenerationRequest, InputPictures, StreamOptions
from serve_app.config.limits import LimitsConfig
from serve_app.flow.deadline import RequestDeadline
from serve_app.flow.events import Event, Picture
from serve_app.flow.isolation import PoisonIsolation
from serve_app.flow.stages import Stages
from serve_app.flow.target import Target
from serve_app.flow.wake_up import WakeUp
from serve_app.generation import generate
from serve_app.load.admission import Admission
from serve_app.load.backlog import NO_LOAD, Backlog, Load
from serve_app.load.stale_cache import CachedValue, StaleWhileRevalidate
from serve_app.models.card import ModelCard, model_card
from serve_app.models.replicas import no_statuses, stage_health, stage_statuses
from serve_app.validation import Validator


class Relay:
    """One served model: validates requests, sends them through the stages, and answers."""

    def __init__(
        self,
        model: ModelConfig,
        limits: LimitsConfig,
        encoder: Any,
        transformer: Any,
        vae: Any,
        admission: Admission | None = None,
        may_sleep: Collection[str] = (),
        others: Callable[[], Load] = lambda: NO_LOAD,
    ) -> None:
        """
        Args:
            admission: shared by all models of the same ingress; None: there is only this model.
            may_sleep: names of the stages that may sleep, so that other models can use their resources meanwhile.
            others: the load of this model at the other ingresses.
        """
        follow_ray_to_loopback()
        self._admission = admission or Admission(limits.max_concurrent_requests)
        self._model, self._limits, self.backlog = model, limits, Backlog(others)
        stages = {"encoder": encoder, "transformer": transformer, "vae": vae}
        wake_up = WakeUp(model.name, [stages[name] for name in may_sleep]) if may_sleep else None
        self._stages = Stages(**stages, isolation=PoisonIsolation(model.name), wake_up=wake_up)
        self.validator = Validator(model, limits)
        self._created = int(time.time())
        self._metrics = StageMetrics(stage="ingress", rank=0, model=model.name)
        self._health = StaleWhileRevalidate(lambda: stage_health(self._stages.by_name, may_sleep))
        self._statuses = StaleWhileRevalidate(lambda: stage_statuses(self._stages.by_name))
        export_regularly(self._metrics.export_requests)

    async def run(
        self,
        requests: list[GenerationRequest],
        pictures: InputPictures | None = None,
        qos: Qos = DEFAULT_QOS,
    ) -> list[Picture]:
        """Returns the images in the order of their requests. Raises a RelayError.

        pictures: input images.
        """
        made: dict[int, Picture] = {}
        async with aclosing(self.events(requests, pictures=pictures, qos=qos)) as events:
            async for event in events:
                if event is not None and isinstance(event.payload, Picture):
                    made[event.index] = event.payload
        return [made[i] for i in range(len(requests))]

    async def events(
        self,
        requests: list[GenerationRequest],
        options: StreamOptions = NO_EVENTS,
        *,
        pictures: InputPictures | None = None,
        qos: Qos = DEFAULT_QOS,
        targets: Sequence[Target] | None = None,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> AsyncGenerator[Event | None, None]:
        """Yields the events of a request until all images are done, as `generate` does. Raises a RelayError.

        timeout_s: overrides limits.request_timeout_s.
        """
        timeout_s = timeout_s or self._limits.request_timeout_s
        limit_s = RequestDeadline(qos, timeout_s).limit_s
        self.backlog.check(requests, limit_s, self._limits.max_queue_s, qos)
        with (
            self._admission.request(self.backlog.place_free_s, qos.share),
            self._metrics.request(),
            self.backlog.taken(requests, qos) as taken,
        ):
            drawn = generate(
                self._stages,
                requests,
                options,
                pictures,
                qos=qos,
                targets=targets,
                timeout_s=timeout_s,
                heartbeat_s=heartbeat_s,
            )
            async with aclosing(drawn) as events:
                async for event in events:
                    if event is not None and isinstance(event.payload, Picture):
                        taken.done(event.index, event.payload)
                    yield event

    def check_admission(self) -> None:
        """Raises Overloaded if there is no place for another request, whatever it asks for."""
        self._admission.check(self.backlog.place_free_s)

    @property
    def name(self) -> str:
        """The name that clients put into `model`."""
        return self._model.name

    def model(self) -> ModelCard:
        """Returns what clients may want to know before they send a request."""
        return model_card(self._model, self._created, self._limits, self.validator.catalog.entries())

    @cached_property
    def paths(self) -> frozenset[str]:
        """Paths under which this model is served."""
        return frozenset(call.path for call in self.model().calls.values())

    async def health(self) -> CachedValue[dict[str, str]]:
        """Returns for each stage one of replicas.SERVING, or why it cannot serve now; as last seen."""
        seen = await self._health.get()
        return seen or CachedValue(dict.fromkeys(self._stages.by_name, "it has not reported yet"), 0.0)

    async def status(self) -> dict[str, Any]:
        """Returns what every replica of every stage reports, and what Serve reports about it; as last seen."""
        seen = await self._statuses.get() or CachedValue(no_statuses(self._stages.by_name), 0.0)
        handles = self._stages.by_name
        stages = {
            name: {"deployment": handles[name].deployment_name, **asdict(of)} for name, of in seen.value.items()
        }
        return {
            "model": self.name,
            "num_in_progress": self._metrics.num_in_flight,
            "queue_s": round(self.backlog.queue_s, 3),
            "age_s": round(seen.age_s, 3),
            **stages,
        }

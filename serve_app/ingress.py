"""The deployment that clients meet, over HTTP or by a Python handle. Imports no torch and reads no tensor."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from cluster.application import application_name
from cluster.termination import DrainOnSigterm
from deployments.config import ModelConfig
from serve_app.admission import Admission
from serve_app.auth.config import NOBODY_ELSE, Access
from serve_app.auth.middleware import Keys, add_access
from serve_app.auth.proxies import check_listening
from serve_app.config import LimitsConfig
from serve_app.generation import Event, Picture
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.model_card import ModelCard
from serve_app.models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api


class Ingress(DrainOnSigterm):
    """The served models as Serve sees them."""

    def __init__(
        self,
        limits: LimitsConfig,
        *models: tuple[ModelConfig, tuple[Any, Any, Any], tuple[str, ...]],
        jobs: JobsConfig = DEFAULT_JOBS,
        access: Access = NOBODY_ELSE,
        key_counter: Any = None,
    ) -> None:
        """
        Args:
            models: each with the handles of its encoder, transformer and VAE, and which of them take turns.
            key_counter: Serve's handle of it, where keys are asked for.
        """
        check_listening(access)
        self.drain_on_sigterm()
        self._cors, self._jobs = access.cors, jobs
        self._keys = None if access.auth is None else Keys(access.auth, key_counter)
        self._admission = Admission(limits.max_concurrent_requests)
        self._models = Models(
            [Relay(model, limits, *stages, self._admission, turns) for model, stages, turns in models]
        )
        for _, stages, _ in models:
            for stage in stages:
                stage.options()  # connects it; the first call would stop the event loop while Serve is silent

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the HTTP application once this replica is made."""
        api = build_api(self._models, self._jobs, application_name())
        add_access(api, self._cors, self._keys)
        return api

    def model(self, name: str | None = None) -> ModelCard:
        """What may be asked of a model; of the first, where none is named. Raises UnknownModel."""
        return self._models.find(name).model()

    async def num_in_progress(self) -> int:
        """Requests that this ingress has taken up and not answered."""
        return self._admission.num_in_progress

    async def generate(self, **fields: Any) -> list[Picture]:
        """For Python handles: the fields of the HTTP body in, pictures (or one video) out.

        `serve.get_app_handle("relay").generate.remote(prompt="a red circle", seed=7).result()`; with a list of
        prompts, what each makes alone, in their order. Pictures go in as bytes: `image=` one or a list, `mask=`;
        for a video `input_reference=`, its first picture or a video. `model=` names one of several models.
        """
        relay = self._meant(fields)
        judged = await asyncio.to_thread(relay.validator.judge_fields, fields)
        return await relay.run(judged.requests, judged.pictures)

    async def stream(self, **fields: Any) -> AsyncIterator[Event]:
        """Like `generate`, but of each picture first its progress, and partial pictures if asked for."""
        relay = self._meant(fields)
        judged = await asyncio.to_thread(relay.validator.judge_stream, fields)
        async with aclosing(relay.events(judged.requests, judged.options, pictures=judged.pictures)) as events:
            async for event in events:
                if event is not None:
                    yield event

    def _meant(self, fields: Mapping[str, Any]) -> Relay:
        """Raises UnknownModel; what is no name at all is told with the other fields."""
        name = fields.get("model")
        return self._models.find(name if isinstance(name, str) else None)

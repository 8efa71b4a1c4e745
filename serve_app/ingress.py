"""The deployment that clients call, over HTTP or by a Python handle. Imports no torch and reads no tensor."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi import FastAPI

from cluster.replicas.application import application_name
from cluster.termination import DrainOnSigterm
from deployments.config.model import ModelConfig
from serve_app.auth.config import LOCAL_ACCESS, Access
from serve_app.auth.middleware import Keys, add_access
from serve_app.auth.proxies import check_listening
from serve_app.config.limits import LimitsConfig
from serve_app.flow.events import Event, Picture
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.load.admission import Admission
from serve_app.load.backlog import Load
from serve_app.load.peer_loads import PeerLoads
from serve_app.models.card import ModelCard
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api


class Ingress(DrainOnSigterm):
    """The Serve deployment that receives requests for all served models."""

    def __init__(
        self,
        limits: LimitsConfig,
        *models: tuple[ModelConfig, tuple[Any, Any, Any], tuple[str, ...]],
        jobs: JobsConfig = DEFAULT_JOBS,
        access: Access = LOCAL_ACCESS,
        key_counter: Any = None,
    ) -> None:
        """
        Args:
            models: each with the handles of its encoder, transformer and VAE, and the names of those that may
                sleep.
            key_counter: Serve's handle of the key counter; None if no keys are required.
        """
        check_listening(access)
        self.drain_on_sigterm()
        self._cors, self._jobs = access.cors, jobs
        self._keys = None if access.auth is None else Keys(access.auth, key_counter)
        self._admission = Admission(limits.max_concurrent_requests)
        self._id = uuid4().hex
        peers = PeerLoads(self._id)
        self._models = Models(
            [
                Relay(model, limits, *stages, self._admission, may_sleep, partial(peers.of, model.name))
                for model, stages, may_sleep in models
            ]
        )
        for _, stages, _ in models:
            for stage in stages:
                stage.options()  # connects; else the first call blocks the event loop while Serve is silent

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the HTTP application. Serve calls this after constructing the replica."""
        api = build_api(self._models, self._jobs, application_name(), self._keys)
        add_access(api, self._cors, self._keys)
        return api

    def model(self, name: str | None = None) -> ModelCard:
        """Returns what may be requested of a model, by default of the first one. Raises UnknownModel."""
        return self._models.find(name).model()

    async def num_in_progress(self) -> int:
        """Returns the number of requests that this ingress has accepted and not yet answered."""
        return self._admission.num_in_progress

    async def loads(self) -> tuple[str, dict[str, Load]]:
        """Returns this ingress's ID and its load of each model, for the other ingresses."""
        return self._id, {relay.name: relay.backlog.load for relay in self._models}

    async def generate(self, **fields: Any) -> list[Picture]:
        """Generates for Python handles: takes the fields of the HTTP body, returns images (or one video).

        `serve.get_app_handle("relay").generate.remote(prompt="a red circle", seed=7).result()`; with a list of
        prompts, returns the images of each prompt in order. Input images are bytes: `image=` one or a list,
        `mask=`; for a video `input_reference=`, its first frame or a video. `model=` names one of several models.
        """
        relay = self._meant(fields)
        validated = await asyncio.to_thread(relay.validator.validate_fields, fields)
        return await relay.run(validated.requests, validated.pictures, validated.qos)

    async def stream(self, **fields: Any) -> AsyncIterator[Event]:
        """Like `generate`, but also yields each image's progress first, and partial images if requested."""
        relay = self._meant(fields)
        validated = await asyncio.to_thread(relay.validator.validate_stream, fields)
        drawn = relay.events(validated.requests, validated.options, pictures=validated.pictures, qos=validated.qos)
        async with aclosing(drawn) as events:
            async for event in events:
                if event is not None:
                    yield event

    def _meant(self, fields: Mapping[str, Any]) -> Relay:
        """Returns the model that the fields name. Raises UnknownModel; validation reports a `model` that is no
        string."""
        name = fields.get("model")
        return self._models.find(name if isinstance(name, str) else None)

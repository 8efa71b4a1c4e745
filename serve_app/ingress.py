"""The deployment that clients meet, over HTTP or by a Python handle. Imports no torch and reads no tensor."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from cluster.application import application_name
from cluster.termination import DrainOnSigterm
from serve_app.generation import Event, Picture
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.relay import Relay
from serve_app.routes import build_api


class Ingress(DrainOnSigterm, Relay):
    """A Relay as Serve sees it."""

    def __init__(self, *args: Any, jobs: JobsConfig = DEFAULT_JOBS) -> None:
        self.drain_on_sigterm()
        super().__init__(*args)
        self._jobs = jobs
        for stage in self._stages.by_name.values():
            stage.options()  # connects it; the first call would stop the event loop while Serve is silent

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the HTTP application once this replica is made."""
        return build_api(self, self._jobs, application_name())

    async def generate(self, **fields: Any) -> list[Picture]:
        """For Python handles: the fields of the HTTP body in, pictures (or one video) out.

        `serve.get_app_handle("relay").generate.remote(prompt="a red circle", seed=7).result()`; with a list of
        prompts, what each makes alone, in their order. Pictures go in as bytes: `image=` one or a list, `mask=`;
        for a video `input_reference=`, its first picture or a video.
        """
        judged = await asyncio.to_thread(self.validator.judge_fields, fields)
        return await self.run(judged.requests, judged.pictures)

    async def stream(self, **fields: Any) -> AsyncIterator[Event]:
        """Like `generate`, but of each picture first its progress, and partial pictures if asked for."""
        judged = await asyncio.to_thread(self.validator.judge_stream, fields)
        async with aclosing(self.events(judged.requests, judged.options, pictures=judged.pictures)) as events:
            async for event in events:
                if event is not None:
                    yield event

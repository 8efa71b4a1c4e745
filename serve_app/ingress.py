"""The deployment that clients meet, over HTTP or by a Python handle. Imports no torch and reads no tensor."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from cluster.termination import DrainOnSigterm
from serve_app.auth.config import NOBODY_ELSE, Access
from serve_app.auth.middleware import Keys, add_access
from serve_app.auth.proxies import check_listening
from serve_app.generation import Event, Picture
from serve_app.relay import Relay
from serve_app.routes import build_api


class Ingress(DrainOnSigterm, Relay):
    """A Relay as Serve sees it."""

    def __init__(self, *args: Any, access: Access = NOBODY_ELSE, key_counter: Any = None) -> None:
        """key_counter: Serve's handle of it, where keys are asked for."""
        check_listening(access)
        self.drain_on_sigterm()
        self._cors = access.cors
        self._keys = None if access.auth is None else Keys(access.auth, key_counter)
        super().__init__(*args)
        for stage in self._stages.by_name.values():
            stage.options()  # connects it; the first call would stop the event loop while Serve is silent

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the HTTP application once this replica is made."""
        api = build_api(self)
        add_access(api, self._cors, self._keys)
        return api

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

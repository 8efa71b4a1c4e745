"""Takes jobs in: a body, judged as if it were drawn at once, becomes a row and files."""

import time
from typing import Any

from fastapi import Request

from serve_app.auth.middleware import charge
from serve_app.errors import BadRequest, UnknownModel
from serve_app.fields import parse_body
from serve_app.jobs.body import keep_body
from serve_app.jobs.job import Job, Kind, new_id
from serve_app.jobs.jobs import Jobs
from serve_app.judging import judge
from serve_app.model_card import VIDEOS
from serve_app.models import Models
from serve_app.openai_api import ImageBody, VideoBody
from serve_app.relay import Relay
from serve_app.validation import Judged

NOT_TAKEN = "no jobs are taken here (jobs.max_queued is 0)"


class JobDesk:
    """Of one ingress."""

    def __init__(self, jobs: Jobs, models: Models) -> None:
        self.jobs, self._models = jobs, models

    async def take_video(self, request: Request, body: VideoBody) -> Job:
        """Raises a RelayError."""
        relay = self._models.find(body.model, VIDEOS)
        return await self.take(request, relay, body, await judge(relay.validator, body))

    async def take(
        self,
        request: Request,
        relay: Relay,
        body: ImageBody | VideoBody,
        judged: Judged,
        remixed_from: str | None = None,
    ) -> Job:
        """A judged body of that model. Raises BadRequest, Overloaded or Unavailable."""
        if not self.jobs.config.max_queued:
            raise BadRequest(f"{NOT_TAKEN}: ask without background, or at /v1/videos/sync")
        kind: Kind = "video" if isinstance(body, VideoBody) else "image"
        await charge(request, judged.requests)
        asked, files = keep_body(body, judged.requests, remixed_from)
        owner = owner_of(request)
        job_id = new_id(kind, owner, request.headers.get("idempotency-key"))
        job = Job(job_id, kind, relay.model().id, owner, time.time(), asked)
        return await self.jobs.accept(job, files)

    async def remix(self, request: Request, source: Job, fields: dict[str, Any]) -> Job:
        """Its video drawn anew by another prompt, as the model's video_to_video does. Raises a RelayError."""
        try:
            relay = self._models.find(source.model)
        except UnknownModel as error:
            raise BadRequest(f"{source.id} is of model {source.model!r}, which is served no more") from error
        if "video_to_video" not in relay.model().calls:
            raise BadRequest(f"model {source.model!r} makes no videos of videos, so it remixes none", "model")
        if source.status != "completed":
            raise BadRequest(f"{source.id} is {source.status}: only what is completed can be remixed")
        [video] = await self.jobs.read(source.id, [source.outputs[0].file])
        left_out = ("seed", "strength", "num_frames")
        kept = {name: value for name, value in source.asked.fields.items() if name not in left_out}
        asked = source.asked
        same: dict[str, Any] = {"size": f"{asked.width}x{asked.height}", "fps": asked.fps}
        if "seconds" not in fields:
            same["num_frames"] = asked.num_frames
        body = parse_body(VideoBody, kept | same | fields | {"input_reference": video})
        return await self.take(request, relay, body, await judge(relay.validator, body), source.id)


def owner_of(request: Request) -> str | None:
    """The name of the API key that a request came with; None without keys."""
    name: str | None = getattr(request.state, "key_name", None)
    return name

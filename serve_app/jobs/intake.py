"""Accepts jobs: validates a body as for an immediate request, and stores it as a row and files."""

import time
from typing import Any

from fastapi import Request

from serve_app.auth.middleware import charge, give_back
from serve_app.errors import BadRequest, Overloaded, UnknownModel
from serve_app.http.body_validation import validate_body
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import ImageBody, VideoBody
from serve_app.jobs.body import keep_body
from serve_app.jobs.job import Job, Kind, new_id
from serve_app.jobs.jobs import Jobs
from serve_app.models.card import VIDEOS
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.validation import ValidatedBody

NOT_TAKEN = "this server accepts no jobs (jobs.max_queued is 0)"


class JobIntake:
    """Accepts the jobs of one ingress."""

    def __init__(self, jobs: Jobs, models: Models) -> None:
        self.jobs, self._models = jobs, models

    async def take_video(self, request: Request, body: VideoBody) -> Job:
        """Validates a video body and accepts it as a job. Raises a RelayError."""
        relay = self._models.find(body.model, VIDEOS)
        return await self.take(request, relay, body, await validate_body(relay.validator, body))

    async def take(
        self,
        request: Request,
        relay: Relay,
        body: ImageBody | VideoBody,
        validated: ValidatedBody,
        remixed_from: str | None = None,
    ) -> Job:
        """Accepts a body that was validated for relay's model. Raises BadRequest, Overloaded or Unavailable."""
        if not self.jobs.config.max_queued:
            raise BadRequest(f"{NOT_TAKEN}: leave out background, or use /v1/videos/sync")
        kind: Kind = "video" if isinstance(body, VideoBody) else "image"
        asked, files = keep_body(body, validated.requests, remixed_from)
        owner = owner_of(request)
        same = request.headers.get("idempotency-key") or None
        job = Job(new_id(kind, owner, same), kind, relay.model().id, owner, time.time(), asked)
        if same is not None and (known := await self.jobs.accepted(job)) is not None:
            return known  # and has been charged
        await charge(request, validated.requests)
        try:
            accepted = await self.jobs.accept(job, files)
        except Overloaded as full:
            raise Overloaded(full.message, relay.backlog.place_free_s()) from full
        if accepted.created_at != job.created_at:  # a repetition came first, and was charged
            await give_back(request)
        return accepted

    async def remix(self, request: Request, source: Job, fields: dict[str, Any]) -> Job:
        """Accepts a job that redraws a job's video with another prompt (video_to_video). Raises a RelayError."""
        try:
            relay = self._models.find(source.model)
        except UnknownModel as error:
            raise BadRequest(f"{source.id} uses model {source.model!r}, which is no longer served") from error
        if "video_to_video" not in relay.model().calls:
            raise BadRequest(f"model {source.model!r} does not redraw videos, so it has no remix", "model")
        if source.status != "completed":
            raise BadRequest(f"{source.id} is {source.status}: only a completed video can be remixed")
        [video] = await self.jobs.read(source.id, [source.outputs[0].file])
        left_out = ("seed", "strength", "num_frames", "deadline_s")
        kept = {name: value for name, value in source.asked.fields.items() if name not in left_out}
        asked = source.asked
        same: dict[str, Any] = {"size": f"{asked.width}x{asked.height}", "fps": asked.fps}
        if "seconds" not in fields:
            same["num_frames"] = asked.num_frames
        body = parse_body(VideoBody, kept | same | fields | {"input_reference": video})
        return await self.take(request, relay, body, await validate_body(relay.validator, body), source.id)


def owner_of(request: Request) -> str | None:
    """Returns the name of the API key that a request came with; None without keys."""
    name: str | None = getattr(request.state, "key_name", None)
    return name

"""The HTTP API, in OpenAI's format, over the served models."""

import base64
import json
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_app.auth.middleware import Keys, charge, charged
from serve_app.errors import BadCall, RelayError, as_relay_error, named
from serve_app.flow.events import Picture
from serve_app.http.bodies import read_json, read_with_files
from serve_app.http.body_limit import BodyLimit
from serve_app.http.body_validation import validate_body
from serve_app.http.description import EDIT_EVENT, EVENT, describe_body, describe_events, drop_422
from serve_app.http.disconnect import while_connected
from serve_app.http.error_responses import ERRORS
from serve_app.http.fields import parse_body
from serve_app.http.head import HeadIsGet
from serve_app.http.openai_answers import ImageData, ImagesResponse, ModelsHealth, StageHealth
from serve_app.http.openai_requests import EditBody, GenerationBody, ImageBody, VideoBody
from serve_app.http.sse import HEARTBEAT_S, answer_with_events
from serve_app.http.trace_ids import TraceIds
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.jobs.intake import JobIntake, owner_of
from serve_app.jobs.jobs import Jobs
from serve_app.jobs.objects import ImageJob, describe_image
from serve_app.jobs.routes import add_jobs
from serve_app.jobs.runner import Runner
from serve_app.models.card import EDITS, GENERATIONS, VIDEO_JOBS, VIDEOS, ModelCard, ModelList
from serve_app.models.served_models import Models
from serve_app.page.routes import add_pages
from serve_app.relay import Relay

STREAMED = "Images; with `stream`, events, and the last one may be an `error`"
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT}}, "description": STREAMED}
}
EDIT_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EDIT_EVENT}}, "description": STREAMED}
}
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": ImageJob, "description": "With `background: true`: the job"}
}
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"video/mp4": {}},
        "description": "MP4; the headers X-Seed, X-Forwards (computed/asked), X-Warnings (a JSON list) and "
        "Server-Timing say how it was made",
    }
}
ELSEWHERE = {
    "/v1/images/variations": "POST the image to /v1/images/edits, with a prompt",
}
"""Paths of OpenAI's API that do not exist here, and what to do instead."""
WITHOUT_V1 = ("/images/generations", "/videos/sync", "/videos", "/models", "/status", "/images/edits")
"""Paths that clients use whose base URL lacks /v1."""


def build_api(
    models: Models, jobs: JobsConfig = DEFAULT_JOBS, application: str = "", keys: Keys | None = None
) -> FastAPI:
    """Builds the HTTP application of one ingress replica. keys: the keys that pay for jobs, if keys are
    required."""
    intake = JobIntake(Jobs(jobs, application, None if keys is None else keys.give_back), models)
    api = FastAPI(
        lifespan=Runner(intake.jobs, models).lifespan,
        title="Latent Relay",
        description="Serves diffusion models over several GPUs, in the format of OpenAI's API.",
        docs_url=None,  # page/routes.py serves them: FastAPI's own pages load scripts from other hosts
        redoc_url=None,
    )
    api.add_exception_handler(Exception, _answer_error)
    api.add_middleware(HeadIsGet)
    api.add_middleware(TraceIds)
    most, most_with_pictures = _max_body_bytes(models)
    api.add_middleware(BodyLimit, max_bytes=most, max_bytes_of=most_with_pictures)
    for kind in (RelayError, HTTPException):
        api.add_exception_handler(kind, _answer_error)
    _add_images(api, models, intake)
    _add_videos(api, models)
    add_jobs(api, intake, models)
    _add_facts(api, models)
    add_pages(api)
    _describe(api, models, (VIDEOS, VIDEO_JOBS) if jobs.max_queued else (VIDEOS,))
    return api


def _add_images(api: FastAPI, models: Models, intake: JobIntake) -> None:
    @api.post(
        GENERATIONS,
        response_model=ImagesResponse,
        responses=ERRORS | EVENTS | ACCEPTED,
        include_in_schema=models.is_asked_at(GENERATIONS),
        summary="Make images; with `stream`, report the progress as events",
    )
    async def images(request: Request) -> ImagesResponse | Response:
        body = parse_body(ImageBody, await read_json(request), is_json=True)
        return await _answer_images(request, models.find(body.model, GENERATIONS), intake, body)

    @api.post(
        EDITS,
        response_model=ImagesResponse,
        responses=ERRORS | EDIT_EVENTS | ACCEPTED,
        include_in_schema=models.is_asked_at(EDITS),
        summary="Make images from images; with `stream`, report the progress as events",
    )
    async def edits(request: Request) -> ImagesResponse | Response:
        fields, is_form = await read_with_files(request, models.limits)
        body = parse_body(EditBody, fields, is_json=not is_form)
        return await _answer_images(request, models.find(body.model, EDITS), intake, body)


async def _answer_images(
    request: Request, relay: Relay, intake: JobIntake, body: ImageBody
) -> ImagesResponse | Response:
    if body.background is not True:
        relay.check_admission()  # before images are decoded, so that a rejection costs little
    validated = await validate_body(relay.validator, body)
    first = validated.requests[0]
    if body.background is True:
        job = describe_image(await intake.take(request, relay, body, validated))
        return JSONResponse(job.model_dump(mode="json"), 202)
    await charge(request, validated.requests)
    qos = validated.qos.asked_by(owner_of(request))
    if body.stream:
        events = relay.events(
            validated.requests,
            validated.options,
            pictures=validated.pictures,
            qos=qos,
            heartbeat_s=HEARTBEAT_S,
        )
        return await while_connected(request, answer_with_events(charged(request, events), first))
    pictures = await while_connected(request, relay.run(validated.requests, validated.pictures, qos))
    return ImagesResponse(
        created=int(time.time()),
        output_format=body.output_format,
        size=f"{first.width}x{first.height}",
        quality=pictures[0].quality,
        data=[_image_data(picture) for picture in pictures],
    )


def _add_videos(api: FastAPI, models: Models) -> None:
    @api.post(
        VIDEOS,
        responses=ERRORS | VIDEO,
        response_class=Response,
        include_in_schema=models.is_asked_at(VIDEOS),
        summary="Make a video and wait for it",
    )
    async def video(request: Request) -> Response:
        fields, is_form = await read_with_files(request, models.limits)
        body = parse_body(VideoBody, fields, is_json=not is_form)
        relay = models.find(body.model, VIDEOS)
        relay.check_admission()
        validated = await validate_body(relay.validator, body)
        await charge(request, validated.requests)
        qos = validated.qos.asked_by(owner_of(request))
        [picture] = await while_connected(request, relay.run(validated.requests, validated.pictures, qos))
        timings = ", ".join(f"{stage};dur={ms}" for stage, ms in picture.timings_ms.items())
        forwards = picture.denoised.forwards
        headers = {
            "X-Seed": str(picture.seed),
            "Server-Timing": timings,
            "X-Forwards": f"{forwards.computed}/{forwards.asked}",
        }
        if picture.warnings:
            headers["X-Warnings"] = json.dumps(picture.warnings)  # JSON is ASCII whatever the prompt contains
        return Response(picture.media.data, media_type=picture.media.media_type, headers=headers)


def _add_facts(api: FastAPI, models: Models) -> None:
    """Adds routes that report models, health and status."""
    health_of = StageHealth if models.is_one else ModelsHealth

    @api.get("/v1/models", summary="All served models")
    async def list_models() -> ModelList:
        return ModelList(data=[card for relay in models for card in relay.model().with_adapters()])

    @api.get("/v1/models/{name:path}", responses={404: ERRORS[404]}, summary="One served model")
    async def one_model(name: str) -> ModelCard:
        relay = models.find(name)
        relay.validator.check_model(name)
        return next(card for card in relay.model().with_adapters() if card.id == name)

    @api.get(
        "/health",
        response_model=health_of,
        responses={503: {"model": health_of}},
        summary="Can every stage serve?",
    )
    async def health() -> JSONResponse:
        seen = await models.health()
        is_ok = seen.value["ok"]
        headers = {"Age": str(int(seen.age_s))} | ({} if is_ok else {"Retry-After": "5"})
        return JSONResponse(seen.value, 200 if is_ok else 503, headers=headers)

    @api.get(
        "/v1/status", summary="Replicas, queues, memory and work per model and stage, and how old these facts are"
    )
    async def status() -> dict[str, Any]:
        return await models.status()


def _describe(api: FastAPI, models: Models, videos: Sequence[str]) -> None:
    """videos: paths of requests for videos."""
    drop_422(api)
    both = ("application/json", "multipart/form-data")
    kinds: tuple[tuple[str, type[GenerationBody], tuple[str, ...]], ...] = (
        (GENERATIONS, ImageBody, both[:1]),
        (EDITS, EditBody, both),
        (VIDEOS, VideoBody, both),
    )
    for path, kind, media_types in kinds:
        cards = [relay.model() for relay in models if path in relay.paths]
        for described in videos if path == VIDEOS else (path,):
            if cards:
                describe_body(api, described, kind, cards, *media_types)
    describe_events(api)


def _max_body_bytes(models: Models) -> tuple[int, dict[str, int]]:
    """Returns (limit for JSON text, limit by path with files), enough for any of the models.

    Text: 12 bytes per character for two prompts + 256 KiB. Files: x 4/3 (base64).
    """
    texts = 2**18 + 2 * 12 * max(limits.max_prompt_characters for limits in models.limits)
    files: dict[str, int] = {}
    for model in (relay.model() for relay in models):
        for kind, call in model.calls.items():
            num = call.max_images + (kind == "inpaint") + call.needs_control
            most = num * (2**10 + model.limits.max_image_bytes) + call.takes_video * model.limits.max_video_bytes
            files[call.path] = max(most, files.get(call.path, 0))
    files[VIDEO_JOBS] = files.get(VIDEOS, 0)
    return texts, {path: texts + most * 4 // 3 for path, most in files.items() if most}


def _image_data(picture: Picture) -> ImageData:
    return ImageData(b64_json=base64.b64encode(picture.media.data).decode(), **picture.facts)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Answers every error in OpenAI's form; unexpected errors are logged and answered with a 500."""
    if isinstance(error, HTTPException):
        path = request.url.path
        refused = BadCall(f"{named(request.method)} {named(path)}: {_why(path, error)}")
        return JSONResponse(refused.body(), error.status_code, dict(error.headers or {}))
    answer = as_relay_error(error)
    return JSONResponse(answer.body(), answer.status, answer.headers())


def _why(path: str, error: HTTPException) -> str:
    """Returns what to do instead, if that is known, else the error's own text."""
    if error.status_code != 404:
        return error.detail
    for elsewhere, instead in ELSEWHERE.items():
        if path.endswith(elsewhere):
            return instead
    if path.endswith(WITHOUT_V1):
        return "the base URL lacks /v1 at its end: add /v1"
    return f"{error.detail}; GET /docs lists all paths"

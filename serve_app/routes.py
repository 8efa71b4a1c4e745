"""HTTP in OpenAI's shapes, over the served models."""

import base64
import json
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_app.auth.middleware import charge, charged
from serve_app.bodies import read_json, read_with_files
from serve_app.body_limit import BodyLimit
from serve_app.description import EDIT_EVENT, EVENT, describe_body, describe_events, drop_422
from serve_app.disconnect import while_connected
from serve_app.error_responses import ERRORS
from serve_app.errors import BadCall, RelayError, as_relay_error, named
from serve_app.fields import parse_body
from serve_app.generation import Picture
from serve_app.head import HeadIsGet
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.jobs.desk import JobDesk
from serve_app.jobs.jobs import Jobs
from serve_app.jobs.objects import ImageJob, describe_image
from serve_app.jobs.routes import add_jobs
from serve_app.jobs.runner import Runner
from serve_app.judging import judge
from serve_app.model_card import EDITS, GENERATIONS, VIDEO_JOBS, VIDEOS, ModelCard, ModelList
from serve_app.models import Models
from serve_app.openai_api import (
    EditBody,
    GenerationBody,
    ImageBody,
    ImageData,
    ImagesResponse,
    ModelsHealth,
    StageHealth,
    VideoBody,
)
from serve_app.page.routes import add_pages
from serve_app.relay import Relay
from serve_app.sse import HEARTBEAT_S, answer_with_events
from serve_app.trace_ids import TraceIds

STREAMED = "Pictures; with `stream`, events, of which an `error` may be the last"
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
        "description": "MP4; more in the headers X-Seed, X-Forwards (computed/asked), X-Warnings (a JSON list), "
        "Server-Timing",
    }
}
ELSEWHERE = {
    "/v1/images/variations": "POST the picture to /v1/images/edits, with a prompt",
}
"""What OpenAI's clients may ask for and is not there, and what to do instead."""
WITHOUT_V1 = ("/images/generations", "/videos/sync", "/videos", "/models", "/status", "/images/edits")
"""Where a client ends up whose base URL is the server's own."""


def build_api(models: Models, jobs: JobsConfig = DEFAULT_JOBS, application: str = "") -> FastAPI:
    """The HTTP application of one ingress replica."""
    desk = JobDesk(Jobs(jobs, application), models)
    api = FastAPI(
        lifespan=Runner(desk.jobs, models).lifespan,
        title="Latent Relay",
        description="Diffusion models over several GPUs, in OpenAI's shapes.",
        docs_url=None,  # page.py: FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
    )
    api.add_exception_handler(Exception, _answer_error)
    api.add_middleware(HeadIsGet)
    api.add_middleware(TraceIds)
    most, most_with_pictures = _max_body_bytes(models)
    api.add_middleware(BodyLimit, max_bytes=most, max_bytes_of=most_with_pictures)
    for kind in (RelayError, HTTPException):
        api.add_exception_handler(kind, _answer_error)
    _add_images(api, models, desk)
    _add_videos(api, models)
    add_jobs(api, desk, models)
    _add_facts(api, models)
    add_pages(api)
    _describe(api, models)
    return api


def _add_images(api: FastAPI, models: Models, desk: JobDesk) -> None:
    @api.post(
        GENERATIONS,
        response_model=ImagesResponse,
        responses=ERRORS | EVENTS | ACCEPTED,
        include_in_schema=models.is_asked_at(GENERATIONS),
        summary="Make pictures; with `stream`, tell what happens on the way",
    )
    async def images(request: Request) -> ImagesResponse | Response:
        body = parse_body(ImageBody, await read_json(request), is_json=True)
        return await _answer_images(request, models.find(body.model, GENERATIONS), desk, body)

    @api.post(
        EDITS,
        response_model=ImagesResponse,
        responses=ERRORS | EDIT_EVENTS | ACCEPTED,
        include_in_schema=models.is_asked_at(EDITS),
        summary="Make pictures of pictures; with `stream`, tell what happens on the way",
    )
    async def edits(request: Request) -> ImagesResponse | Response:
        fields, is_form = await read_with_files(request, models.limits)
        body = parse_body(EditBody, fields, is_json=not is_form)
        return await _answer_images(request, models.find(body.model, EDITS), desk, body)


async def _answer_images(
    request: Request, relay: Relay, desk: JobDesk, body: ImageBody
) -> ImagesResponse | Response:
    judged = await judge(relay.validator, body)
    first = judged.requests[0]
    if body.background is True:
        job = describe_image(await desk.take(request, relay, body, judged))
        return JSONResponse(job.model_dump(mode="json"), 202)
    await charge(request, judged.requests)
    if body.stream:
        events = relay.events(judged.requests, judged.options, pictures=judged.pictures, heartbeat_s=HEARTBEAT_S)
        return await while_connected(request, answer_with_events(charged(request, events), first))
    pictures = await while_connected(request, relay.run(judged.requests, judged.pictures))
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
        judged = await judge(relay.validator, body)
        await charge(request, judged.requests)
        [picture] = await while_connected(request, relay.run(judged.requests, judged.pictures))
        timings = ", ".join(f"{stage};dur={ms}" for stage, ms in picture.timings_ms.items())
        forwards = picture.denoised.forwards
        headers = {
            "X-Seed": str(picture.seed),
            "Server-Timing": timings,
            "X-Forwards": f"{forwards.computed}/{forwards.asked}",
        }
        if picture.warnings:
            headers["X-Warnings"] = json.dumps(picture.warnings)  # in ASCII, whatever the prompt
        return Response(picture.media.data, media_type=picture.media.media_type, headers=headers)


def _add_facts(api: FastAPI, models: Models) -> None:
    """What there is to know without asking for a picture."""
    health_of = StageHealth if models.is_one else ModelsHealth

    @api.get("/v1/models", summary="What is served")
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
        is_ok = seen.answer["ok"]
        headers = {"Age": str(int(seen.age_s))} | ({} if is_ok else {"Retry-After": "5"})
        return JSONResponse(seen.answer, 200 if is_ok else 503, headers=headers)

    @api.get("/v1/status", summary="Replicas, queues, memory and work per model and stage, and how old that is")
    async def status() -> dict[str, Any]:
        return await models.status()


def _describe(api: FastAPI, models: Models) -> None:
    drop_422(api)
    both = ("application/json", "multipart/form-data")
    kinds: tuple[tuple[str, type[GenerationBody], tuple[str, ...]], ...] = (
        (GENERATIONS, ImageBody, both[:1]),
        (EDITS, EditBody, both),
        (VIDEOS, VideoBody, both),
    )
    for path, kind, media_types in kinds:
        cards = [relay.model() for relay in models if path in relay.paths]
        for described in (path, VIDEO_JOBS) if path == VIDEOS else (path,):
            if cards:
                describe_body(api, described, kind, cards, *media_types)
    describe_events(api)


def _max_body_bytes(models: Models) -> tuple[int, dict[str, int]]:
    """Two prompts, of each of whose characters JSON may make 12 bytes, and ample room for the rest; and by path,
    with pictures or a video, of each 3 of whose bytes a data URL makes 4. What any model takes may come."""
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
    """Every error in OpenAI's form; what nobody foresaw is logged and told as a 500."""
    if isinstance(error, HTTPException):
        path = request.url.path
        refused = BadCall(f"{named(request.method)} {named(path)}: {_why(path, error)}")
        return JSONResponse(refused.body(), error.status_code, dict(error.headers or {}))
    refusal = as_relay_error(error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


def _why(path: str, error: HTTPException) -> str:
    """What to do instead, where that is known."""
    if error.status_code != 404:
        return error.detail
    for elsewhere, instead in ELSEWHERE.items():
        if path.endswith(elsewhere):
            return instead
    if path.endswith(WITHOUT_V1):
        return "the base URL lacks /v1 at its end: add /v1"
    return f"{error.detail}; GET /docs lists what there is"

"""HTTP in OpenAI's shapes, over a Relay."""

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException

from serve_app.bodies import read_json, read_json_or_form
from serve_app.body_limit import BodyLimit
from serve_app.description import EDIT_EVENT, EVENT, describe_body, describe_events, drop_422
from serve_app.disconnect import while_connected
from serve_app.errors import BadCall, RelayError, as_relay_error, named
from serve_app.fields import parse_body
from serve_app.generation import Picture
from serve_app.head import HeadIsGet
from serve_app.input_videos import JUDGING_VIDEOS
from serve_app.model_card import EDITS, GENERATIONS, VIDEOS, ModelCard, ModelList
from serve_app.openai_api import (
    EditBody,
    ErrorResponse,
    ImageBody,
    ImageData,
    ImagesResponse,
    StageHealth,
    VideoBody,
)
from serve_app.page.routes import add_pages
from serve_app.relay import Relay
from serve_app.replicas import SERVING
from serve_app.sse import HEARTBEAT_S, answer_with_events
from serve_app.trace_ids import TraceIds
from serve_app.validation import Judged

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it",
        404: "Unknown model or adapter",
        413: "The body is too long",
        429: "Too many requests in progress; see Retry-After",
        500: "A stage failed",
        503: "A stage cannot serve now; see Retry-After",
        504: "Not done within the deadline",
    }.items()
}
STREAMED = "Pictures; with `stream`, events, of which an `error` may be the last"
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT}}, "description": STREAMED}
}
EDIT_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EDIT_EVENT}}, "description": STREAMED}
}
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"video/mp4": {}},
        "description": "MP4; more in the headers X-Seed, X-Forwards (computed/asked), X-Warnings, Server-Timing",
    }
}
ELSEWHERE = {
    "/v1/videos": "no video is made in the background: POST the same fields to /v1/videos/sync, which waits for "
    "the video and answers with it",
    "/v1/images/variations": "POST the picture to /v1/images/edits, with a prompt",
}
"""What OpenAI's clients may ask for and is not there, and what to do instead."""
WITHOUT_V1 = ("/images/generations", "/videos/sync", "/videos", "/models", "/status", "/images/edits")
"""Where a client ends up whose base URL is the server's own."""


def build_api(relay: Relay) -> FastAPI:
    """The HTTP application of one ingress replica."""
    api = FastAPI(
        title="Latent Relay",
        description="Diffusion models over several GPUs, in OpenAI's shapes.",
        docs_url=None,  # page.py: FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
    )
    api.add_exception_handler(Exception, _answer_error)
    api.add_middleware(HeadIsGet)
    api.add_middleware(TraceIds)
    most, most_with_pictures = _max_body_bytes(relay)
    api.add_middleware(BodyLimit, max_bytes=most, max_bytes_of=most_with_pictures)
    for kind in (RelayError, HTTPException):
        api.add_exception_handler(kind, _answer_error)
    _add_images(api, relay)
    _add_videos(api, relay)
    _add_facts(api, relay)
    add_pages(api)
    _describe(api, relay.model())
    return api


def _add_images(api: FastAPI, relay: Relay) -> None:
    served = {call.path for call in relay.model().calls.values()}

    @api.post(
        GENERATIONS,
        response_model=ImagesResponse,
        responses=ERRORS | EVENTS,
        include_in_schema=GENERATIONS in served,
        summary="Make pictures; with `stream`, tell what happens on the way",
    )
    async def images(request: Request) -> ImagesResponse | EventSourceResponse:
        body = parse_body(ImageBody, await read_json(request), is_json=True)
        return await _answer_images(request, relay, body, relay.validator.judge(body))

    @api.post(
        EDITS,
        response_model=ImagesResponse,
        responses=ERRORS | EDIT_EVENTS,
        include_in_schema=EDITS in served,
        summary="Make pictures of pictures; with `stream`, tell what happens on the way",
    )
    async def edits(request: Request) -> ImagesResponse | EventSourceResponse:
        fields, is_form = await _read_with_pictures(request, relay)
        body = parse_body(EditBody, fields, is_json=not is_form)
        return await _answer_images(request, relay, body, await asyncio.to_thread(relay.validator.judge, body))


async def _answer_images(
    request: Request, relay: Relay, body: ImageBody, judged: Judged
) -> ImagesResponse | EventSourceResponse:
    first = judged.requests[0]
    if body.stream:
        events = relay.events(judged.requests, judged.options, pictures=judged.pictures, heartbeat_s=HEARTBEAT_S)
        return await while_connected(request, answer_with_events(events, first))
    pictures = await while_connected(request, relay.run(judged.requests, judged.pictures))
    return ImagesResponse(
        created=int(time.time()),
        output_format=body.output_format,
        size=f"{first.width}x{first.height}",
        quality=pictures[0].quality,
        data=[_image_data(picture) for picture in pictures],
    )


def _add_videos(api: FastAPI, relay: Relay) -> None:
    @api.post(
        VIDEOS,
        responses=ERRORS | VIDEO,
        response_class=Response,
        include_in_schema=relay.model().media == "video",
        summary="Make a video and wait for it",
    )
    async def video(request: Request) -> Response:
        fields, is_form = await _read_with_pictures(request, relay)
        body = parse_body(VideoBody, fields, is_json=not is_form)
        has_video = body.pictures is not None and body.pictures.video is not None
        judging = JUDGING_VIDEOS if has_video else None
        judged = await asyncio.get_running_loop().run_in_executor(judging, relay.validator.judge, body)
        [picture] = await while_connected(request, relay.run(judged.requests, judged.pictures))
        timings = ", ".join(f"{stage};dur={ms}" for stage, ms in picture.timings_ms.items())
        forwards = picture.denoised.forwards
        headers = {
            "X-Seed": str(picture.seed),
            "Server-Timing": timings,
            "X-Forwards": f"{forwards.computed}/{forwards.asked}",
        }
        if picture.warnings:
            headers["X-Warnings"] = "; ".join(picture.warnings)
        return Response(picture.media.data, media_type=picture.media.media_type, headers=headers)


def _add_facts(api: FastAPI, relay: Relay) -> None:
    """What there is to know without asking for a picture."""

    @api.get("/v1/models", summary="What is served")
    async def models() -> ModelList:
        return ModelList(data=relay.model().with_adapters())

    @api.get("/v1/models/{name:path}", responses={404: ERRORS[404]}, summary="One served model")
    async def one_model(name: str) -> ModelCard:
        relay.validator.check_model(name)
        return next(card for card in relay.model().with_adapters() if card.id == name)

    @api.get(
        "/health",
        response_model=StageHealth,
        responses={503: {"model": StageHealth}},
        summary="Can every stage serve?",
    )
    async def health() -> JSONResponse:
        seen = await relay.health()
        is_ok = all(state in SERVING for state in seen.answer.values())
        body = StageHealth(ok=is_ok, stages=seen.answer).model_dump()
        headers = {"Age": str(int(seen.age_s))} | ({} if is_ok else {"Retry-After": "5"})
        return JSONResponse(body, 200 if is_ok else 503, headers=headers)

    @api.get("/v1/status", summary="Replicas, queues, memory and work per stage, and how old that is")
    async def status() -> dict[str, Any]:
        return await relay.status()


def _describe(api: FastAPI, model: ModelCard) -> None:
    drop_422(api)
    served = {call.path for call in model.calls.values()}
    if GENERATIONS in served:
        describe_body(api, GENERATIONS, ImageBody, model, "application/json")
    if EDITS in served:
        describe_body(api, EDITS, EditBody, model, "application/json", "multipart/form-data")
    if VIDEOS in served:
        describe_body(api, VIDEOS, VideoBody, model, "application/json", "multipart/form-data")
    describe_events(api)


async def _read_with_pictures(request: Request, relay: Relay) -> tuple[Mapping[str, Any], bool]:
    """As read_json_or_form does; a text may be a data URL."""
    limits = relay.model().limits
    return await read_json_or_form(request, max_text_bytes=2 * max(limits.max_image_bytes, limits.max_video_bytes))


def _max_body_bytes(relay: Relay) -> tuple[int, dict[str, int]]:
    """Two prompts, of each of whose characters JSON may make 12 bytes, and ample room for the rest; and by path,
    with pictures or a video, of each 3 of whose bytes a data URL makes 4."""
    model = relay.model()
    texts = 2**18 + 2 * 12 * model.limits.max_prompt_characters
    files: dict[str, int] = {}
    for kind, call in model.calls.items():
        num = call.max_images + (kind == "inpaint") + call.needs_control
        most = num * (2**10 + model.limits.max_image_bytes) + call.takes_video * model.limits.max_video_bytes
        files[call.path] = max(most, files.get(call.path, 0))
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

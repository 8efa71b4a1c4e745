"""HTTP in OpenAI's shapes, over a Relay."""

import base64
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from serve_app.body_limit import BodyLimit
from serve_app.errors import BadCall, BadRequest, RelayError, as_relay_error
from serve_app.generation import Picture
from serve_app.openai_api import (
    CompletedEvent,
    ErrorResponse,
    ImageBody,
    ImageData,
    ImagesResponse,
    ModelCard,
    ModelList,
    PartialImageEvent,
    ProgressEvent,
    StageHealth,
    TimingsMs,
    VideoBody,
)
from serve_app.page import add_page
from serve_app.relay import Relay
from serve_app.replicas import ASLEEP, OK
from serve_app.sse import HEARTBEAT_S, answer_with_events
from serve_app.trace_ids import TraceIds
from serve_app.validation import bad_request, parse_body

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it",
        404: "Unknown model",
        413: "The body is too long",
        429: "Too many requests in progress; see Retry-After",
        500: "A stage failed",
        503: "A stage cannot serve now; see Retry-After",
        504: "Not done within the deadline",
    }.items()
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ImageStreamEvent"}}},
        "description": "Pictures; with `stream`, events, of which an `error` may be the last",
    }
}
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/mp4": {}}, "description": "MP4; the headers X-Seed and Server-Timing tell more"}
}
VIDEO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoBody.model_json_schema()} for kind in ("application/json", "multipart/form-data")
        },
    }
}
ELSEWHERE = {
    "/v1/videos": "no video is made in the background: POST the same fields to /v1/videos/sync, which waits for "
    "the video and answers with it",
    "/v1/images/edits": "pictures are made from text alone: POST to /v1/images/generations",
    "/v1/images/variations": "pictures are made from text alone: POST to /v1/images/generations",
}
"""What OpenAI's clients may ask for and is not there, and what to do instead."""


def build_api(relay: Relay) -> FastAPI:
    """The HTTP application of one ingress replica."""
    api = FastAPI(title="Latent Relay", description="Diffusion models over several GPUs, in OpenAI's shapes.")
    api.add_exception_handler(Exception, _answer_error)
    api.add_middleware(TraceIds)
    api.add_middleware(BodyLimit, max_bytes=_max_body_bytes(relay))
    for kind in (RelayError, RequestValidationError, HTTPException):
        api.add_exception_handler(kind, _answer_error)

    @api.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        responses=ERRORS | EVENTS,
        summary="Make pictures; with `stream`, tell what happens on the way",
    )
    async def images(body: ImageBody) -> ImagesResponse | EventSourceResponse:
        requests = relay.validator.images(body)
        if body.stream:
            events = relay.events(requests, body.stream_options, heartbeat_s=HEARTBEAT_S)
            return await answer_with_events(events, requests[0])
        pictures = await relay.run(requests)
        return ImagesResponse(
            created=int(time.time()),
            output_format=body.output_format,
            size=f"{requests[0].width}x{requests[0].height}",
            data=[_image_data(picture) for picture in pictures],
        )

    @api.post(
        "/v1/videos/sync",
        responses=ERRORS | VIDEO,
        response_class=Response,
        openapi_extra=VIDEO_BODY,
        summary="Make a video and wait for it",
    )
    async def video(request: Request) -> Response:
        body = parse_body(VideoBody, await _fields(request))
        [picture] = await relay.run([relay.validator.video(body)])
        timings = ", ".join(f"{stage};dur={ms}" for stage, ms in picture.timings_ms.items())
        headers = {"X-Seed": str(picture.seed), "Server-Timing": timings}
        return Response(picture.media.data, media_type=picture.media.media_type, headers=headers)

    @api.get("/v1/models", summary="What is served")
    async def models() -> ModelList:
        return ModelList(data=[relay.model()])

    @api.get("/v1/models/{name:path}", responses={404: ERRORS[404]}, summary="One served model")
    async def model(name: str) -> ModelCard:
        relay.validator.check_model(name)
        return relay.model()

    @api.get(
        "/health",
        response_model=StageHealth,
        responses={503: {"model": StageHealth}},
        summary="Can every stage serve?",
    )
    async def health() -> JSONResponse:
        stages = await relay.health()
        is_ok = all(state in (OK, ASLEEP) for state in stages.values())
        body = StageHealth(ok=is_ok, stages=stages).model_dump()
        return JSONResponse(body, 200 if is_ok else 503, headers={} if is_ok else {"Retry-After": "5"})

    @api.get("/v1/status", responses={503: ERRORS[503]}, summary="Replicas, queues, memory and work per stage")
    async def status() -> dict[str, Any]:
        return await relay.status()

    add_page(api)
    _drop_422(api)
    _describe_events(api)
    return api


def _max_body_bytes(relay: Relay) -> int:
    """Two prompts, of each of whose characters JSON may make 12 bytes, and ample room for the rest."""
    return 2**18 + 2 * 12 * relay.model().limits.max_prompt_characters


def _image_data(picture: Picture) -> ImageData:
    return ImageData(
        b64_json=base64.b64encode(picture.media.data).decode(),
        seed=picture.seed,
        timings_ms=TimingsMs(**picture.timings_ms),
    )


async def _fields(request: Request) -> dict[str, Any]:
    """The body's fields, from JSON or from a form, as which OpenAI's own `POST /v1/videos` takes them."""
    if "form" in request.headers.get("content-type", ""):
        fields = dict(await request.form())
        if any(name.startswith("{") for name in fields):
            raise _not_declared_json(request)
        return fields
    try:
        fields = await request.json()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(fields).__name__}")
    return fields


def _not_declared_json(request: Request) -> BadRequest:
    """For a body that was not read as JSON: curl calls every body a form unless told otherwise."""
    kind = request.headers.get("content-type")
    return BadRequest(f"send JSON with the header Content-Type: application/json, got {kind or 'no such header'}")


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Every error in OpenAI's form; what nobody foresaw is logged and told as a 500."""
    if isinstance(error, RequestValidationError):
        is_raw = isinstance(error.body, bytes)
        error = _not_declared_json(request) if is_raw else bad_request(error.errors())
    if isinstance(error, HTTPException):
        elsewhere = (why for path, why in ELSEWHERE.items() if request.url.path.endswith(path))
        why = next(elsewhere, error.detail) if error.status_code == 404 else error.detail
        refused = BadCall(f"{request.method} {request.url.path}: {why}")
        return JSONResponse(refused.body(), error.status_code, dict(error.headers or {}))
    refusal = as_relay_error(error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


def _drop_422(api: FastAPI) -> None:
    """FastAPI documents a 422 for every body; here a bad field is a 400."""
    for path in api.openapi()["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)


def _describe_events(api: FastAPI) -> None:
    """FastAPI describes the models of answers; an event is only a part of one."""
    adapter: TypeAdapter[Any] = TypeAdapter(ProgressEvent | PartialImageEvent | CompletedEvent)
    schema = adapter.json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    schemas = api.openapi()["components"]["schemas"]
    schemas |= schema.pop("$defs")
    schemas["ImageStreamEvent"] = schema

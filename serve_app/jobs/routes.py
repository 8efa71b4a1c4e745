"""The HTTP routes of jobs: OpenAI's /v1/videos, and the same for images."""

from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import BadRequest
from serve_app.http.bodies import read_json_or_form, read_with_files
from serve_app.http.error_responses import ERRORS
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import VideoBody
from serve_app.jobs.content import Variant, answer_with_content
from serve_app.jobs.intake import JobIntake, owner_of
from serve_app.jobs.job import Kind, Page
from serve_app.jobs.objects import (
    DeletedJob,
    ImageJob,
    ImageJobList,
    VideoJob,
    VideoJobList,
    describe_image,
    describe_video,
)
from serve_app.models.card import IMAGE_JOBS, VIDEO_JOBS, VIDEOS
from serve_app.models.served_models import Models

POLL_AFTER_MS = "1000"
"""How long OpenAI's client is told to wait before it polls again."""
CONTENT: dict[int | str, dict[str, Any]] = {
    status: {"content": {"video/mp4": {}, "image/*": {}}, "description": text}
    for status, text in {
        200: "The file",
        206: "The part of the file that Range asks for",
        416: "Range lies outside the file",
    }.items()
}
JOB_ERRORS = {status: ERRORS[status] for status in (400, 404, 503)}


class PageQuery(BaseModel):
    """Which part of a list of jobs is asked for."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="the last id of the previous page")
    order: Literal["asc", "desc"] = Field("desc", description="by the time of creation")


class VideoContentQuery(BaseModel):
    """Which file of a video job is asked for."""

    model_config = ConfigDict(extra="forbid")

    variant: Variant = Field("video", description="thumbnail: one frame, as WebP; spritesheets are not supported")


class ImageContentQuery(BaseModel):
    """Which of the n images of a job is asked for."""

    model_config = ConfigDict(extra="forbid")

    index: int = Field(0, ge=0)


def add_jobs(api: FastAPI, intake: JobIntake, models: Models) -> None:
    """Adds all routes of jobs. Those for media that no served model makes are left out of the OpenAPI schema."""
    made = {relay.model().media for relay in models}
    _add_videos(api, intake, models)
    _add_kind(api, intake, "video", VIDEO_JOBS, is_described="video" in made)
    _add_kind(api, intake, "image", IMAGE_JOBS, is_described="image" in made)


def _add_videos(api: FastAPI, intake: JobIntake, models: Models) -> None:
    takes_jobs = bool(intake.jobs.config.max_queued)
    is_described = takes_jobs and models.is_asked_at(VIDEOS)
    remixes = takes_jobs and any("video_to_video" in relay.model().calls for relay in models)

    @api.post(
        VIDEO_JOBS,
        responses=ERRORS,
        include_in_schema=is_described,
        summary="Make a video in the background; poll its job until it is completed",
    )
    async def create(request: Request) -> VideoJob:
        fields, is_form = await read_with_files(request, models.limits)
        body = parse_body(VideoBody, fields, is_json=not is_form)
        return describe_video(await intake.take_video(request, body))

    @api.post(
        VIDEO_JOBS + "/{job_id}/remix",
        responses=ERRORS,
        include_in_schema=remixes,
        openapi_extra=_described_body({"prompt": {"type": "string", "minLength": 1}}, "prompt"),
        summary="Redraw a video with another prompt",
    )
    async def remix(request: Request, job_id: str) -> VideoJob:
        fields, _ = await read_json_or_form(request)
        if not fields.get("prompt"):
            raise BadRequest("prompt is missing: say how to redraw the video", "prompt")
        if "input_reference" in fields:
            raise BadRequest(
                "input_reference: the input is always the video that is remixed: leave it out", "input_reference"
            )
        source = await intake.jobs.get(job_id, "video", owner_of(request))
        return describe_video(await intake.remix(request, source, dict(fields)))


def _add_kind(api: FastAPI, intake: JobIntake, kind: Kind, path: str, *, is_described: bool) -> None:
    """Adds the routes for accepted jobs of one kind."""
    jobs, is_video = intake.jobs, kind == "video"
    describe: Any = describe_video if is_video else describe_image
    one, several = (VideoJob, VideoJobList) if is_video else (ImageJob, ImageJobList)
    content_query: Any = VideoContentQuery if is_video else ImageContentQuery
    options: dict[str, Any] = {"responses": JOB_ERRORS, "include_in_schema": is_described}
    what = f"{kind} jobs of the same API key"

    @api.get(
        path, response_model=several, openapi_extra=_described_query(PageQuery), summary=f"All {what}", **options
    )
    async def page(request: Request) -> Any:
        asked = Page(**parse_body(PageQuery, dict(request.query_params)).model_dump())
        found = await jobs.page(kind, owner_of(request), asked)
        ids = [job.id for job in found.jobs]
        return several(
            data=[describe(job) for job in found.jobs],
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=found.has_more,
        )

    @api.get(path + "/{job_id}", response_model=one, summary=f"The status of a {kind} job", **options)
    async def get(request: Request, job_id: str) -> Response:
        job = describe(await jobs.get(job_id, kind, owner_of(request)))
        return JSONResponse(job.model_dump(mode="json"), headers={"openai-poll-after-ms": POLL_AFTER_MS})

    @api.delete(
        path + "/{job_id}", summary=f"Cancel a {kind} job that has not ended; delete one that has", **options
    )
    async def remove(request: Request, job_id: str) -> DeletedJob:
        await jobs.delete(job_id, kind, owner_of(request))
        return DeletedJob(id=job_id, object="video.deleted" if is_video else "image.job.deleted")

    @api.get(
        path + "/{job_id}/content",
        response_class=Response,
        openapi_extra=_described_query(content_query),
        summary=f"The file of a {kind} job; accepts Range",
        **options | {"responses": JOB_ERRORS | CONTENT},
    )
    async def content(request: Request, job_id: str) -> Response:
        asked = parse_body(content_query, dict(request.query_params))
        job = await jobs.get(job_id, kind, owner_of(request))
        return await answer_with_content(request, jobs, job, **asked.model_dump())


def _described_query(kind: type[BaseModel]) -> dict[str, Any]:
    """Describes a query in OpenAPI. The routes parse it themselves, so that its errors look like all others."""
    fields = kind.model_json_schema()["properties"]
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]}


def _described_body(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": [*required]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

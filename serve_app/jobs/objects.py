"""Jobs as clients see them: a video job in OpenAI's format, an image job in a similar one."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from serve_app.http.openai_answers import Drawn
from serve_app.jobs.job import Job

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class JobError(BaseModel):
    """The same fields as in any other request's error."""

    code: str
    message: str
    param: str | None


class AnyJob(BaseModel):
    """The fields that video and image jobs have in common."""

    id: str
    model: str
    status: JobStatus
    progress: int = Field(description="percent")
    created_at: int = Field(description="Unix time, seconds")
    completed_at: int | None = Field(description="when it ended")
    expires_at: int | None = Field(description="when it is deleted with its files")
    error: JobError | None
    prompt: str
    size: str
    seed: int = Field(description="beyond OpenAI; seed of the first image, or of the video")


class VideoJob(AnyJob):
    """A job of `POST /v1/videos`."""

    object: Literal["video"] = "video"
    seconds: str
    remixed_from_video_id: str | None
    num_frames: int = Field(description="beyond OpenAI")
    fps: int = Field(description="beyond OpenAI")
    drawn: Drawn | None = Field(description="beyond OpenAI: how the video was drawn; null until then")


class ImageJob(AnyJob):
    """A job of an image request with `background: true`; beyond OpenAI."""

    object: Literal["image.job"] = "image.job"
    n: int
    output_format: Literal["png", "jpeg", "webp"]
    data: list[Drawn] = Field(description="how each image was drawn; empty until then")


class AnyJobList(BaseModel):
    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoJobList(AnyJobList):
    data: list[VideoJob]


class ImageJobList(AnyJobList):
    data: list[ImageJob]


class DeletedJob(BaseModel):
    id: str
    deleted: Literal[True] = True
    object: Literal["video.deleted", "image.job.deleted"]


def describe_video(job: Job) -> VideoJob:
    asked = job.asked
    drawn = [Drawn.model_validate(output.facts) for output in job.outputs]
    return VideoJob(
        **_facts(job),
        seconds=f"{asked.num_frames / asked.fps:.4g}",
        remixed_from_video_id=asked.remixed_from,
        num_frames=asked.num_frames,
        fps=asked.fps,
        drawn=drawn[0] if drawn else None,
    )


def describe_image(job: Job) -> ImageJob:
    return ImageJob(
        **_facts(job),
        n=job.asked.num_outputs,
        output_format=job.asked.fields.get("output_format", "png"),
        data=[Drawn.model_validate(output.facts) for output in job.outputs],
    )


def _facts(job: Job) -> dict[str, Any]:
    asked, failure = job.asked, job.failure
    return {
        "id": job.id,
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "error": None if failure is None else JobError(**vars(failure)),
        "prompt": asked.fields["prompt"],
        "size": f"{asked.width}x{asked.height}",
        "seed": asked.fields["seed"],
    }

"""Converts a request's body to what a job stores, and back: its fields as JSON, and its input files."""

from collections.abc import Mapping
from typing import Any

from deployments.request import GenerationRequest
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, ImageBody, VideoBody
from serve_app.jobs.job import Asked, BodyKind, Job
from serve_app.jobs.jobs import Jobs

BODIES: Mapping[BodyKind, type[ImageBody] | type[VideoBody]] = {
    "generation": ImageBody,
    "edit": EditBody,
    "video": VideoBody,
}
"""Body classes by the job's `body_kind`."""


def keep_body(
    body: ImageBody | VideoBody, requests: list[GenerationRequest], remixed_from: str | None = None
) -> tuple[Asked, dict[str, bytes]]:
    """Returns what a job stores of a validated body, and the input files by name.

    The seed is stored even if it was chosen at random: however often the job is run, the image is the same.
    """
    inputs: dict[str, list[str]] = {}
    files: dict[str, bytes] = {}
    takes_several = []
    for field in sorted(body.model_fields_set):
        value = getattr(body, field)
        several = isinstance(value, tuple) and bool(value) and all(isinstance(each, bytes) for each in value)
        if not (several or isinstance(value, bytes)):
            continue
        if several:
            takes_several.append(field)
        given = {f"{field}-{i}": each for i, each in enumerate(value if several else (value,))}
        inputs[field] = list(given)
        files |= given
    first = requests[0]
    fields = body.model_dump(mode="json", exclude_unset=True, exclude={*inputs}) | {"seed": first.seed}
    kind = next(kind for kind, of in BODIES.items() if of is type(body))
    asked = Asked(
        body_kind=kind,
        fields=fields,
        inputs=inputs,
        takes_several=tuple(takes_several),
        width=first.width,
        height=first.height,
        num_frames=first.num_frames,
        fps=first.fps,
        num_outputs=len(requests),
        remixed_from=remixed_from,
        megapixel_steps=sum(each.megapixel_steps for each in requests),
    )
    return asked, files


async def read_body(jobs: Jobs, job: Job) -> ImageBody | VideoBody:
    """Restores the body of a job. Raises BadRequest if this version no longer accepts such a body."""
    asked = job.asked
    given: dict[str, Any] = {}
    for field, names in asked.inputs.items():
        files = await jobs.read(job.id, names)
        given[field] = files if field in asked.takes_several else files[0]
    return parse_body(BODIES[asked.body_kind], {**asked.fields, **given})

"""Sends a job's file, whole or the range that is asked for, without holding the whole file in memory."""

import re
from collections.abc import Iterator
from typing import Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from serve_app.errors import BadCall, BadRequest
from serve_app.http.head import is_head
from serve_app.jobs.job import Job
from serve_app.jobs.jobs import Jobs

RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})")
"""A Range header with one range. If it has several, the whole file is sent, which RFC 9110 (14.2) allows."""
NOT_SATISFIABLE = 416
Variant = Literal["video", "thumbnail"]


async def answer_with_content(
    request: Request, jobs: Jobs, job: Job, index: int = 0, variant: Variant = "video"
) -> Response:
    """Raises BadRequest if the file does not exist, or not yet. variant: used for videos only."""
    if job.status != "completed":
        why = f": {job.failure.message}" if job.failure else ""
        soon = "; ask for its status until it is completed" if job.status in ("queued", "in_progress") else ""
        raise BadRequest(f"{job.id} is {job.status}, so it has no content{why}{soon}")
    if not 0 <= index < len(job.outputs):
        raise BadRequest(f"index must be below {len(job.outputs)}, got {index}", "index")
    output = job.outputs[index]
    file, media_type = output.file, output.media_type
    if variant == "thumbnail":
        if output.thumbnail is None:
            raise BadRequest(f"{job.id} has no thumbnail: none could be made when it was drawn", "variant")
        file, media_type = output.thumbnail, "image/webp"
    size, etag = await jobs.file_size(job.id, file), f'"{file}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f'inline; filename="{job.id}.{file.rpartition(".")[2]}"',
    }
    part = _part(request, size, etag)
    start, end = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if start >= end:
        refused = BadCall(f"Range: {request.headers['range'][:100]} lies outside the file, which has {size} bytes")
        return JSONResponse(refused.body(), NOT_SATISFIABLE, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Length"] = str(end - start)
    status = 200 if part is None else 206
    if is_head(request.scope):
        return Response(None, status, headers, media_type)
    files = await jobs.open_files()
    pieces: Iterator[bytes] = files.pieces(job.id, file, start, end)
    return StreamingResponse(iterate_in_threadpool(pieces), status, headers, media_type)


def _part(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Returns (start, end) of the bytes asked for, possibly an empty range; None: the whole file."""
    asked = RANGE.fullmatch(request.headers.get("range", "").strip())
    if asked is None or asked.groups() == ("", "") or request.headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    if not first:  # the last `last` bytes
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1 if last else size)

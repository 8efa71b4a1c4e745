"""A file of a job as an answer: whole, or the part that is asked for. It is never in memory as a whole."""

import re
from collections.abc import Iterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from serve_app.errors import BadCall, BadRequest
from serve_app.jobs.job import Job
from serve_app.jobs.jobs import Jobs

RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})")
"""One range. Of several, all of the file is the answer, which RFC 9110 (14.2) allows."""
NOT_SATISFIABLE = 416


async def answer_with_content(request: Request, jobs: Jobs, job: Job, index: int) -> Response:
    """Raises BadRequest where it is not there, or not yet."""
    if job.status != "completed":
        why = f": {job.failure.message}" if job.failure else ""
        soon = "; ask for its status until it is completed" if job.status in ("queued", "in_progress") else ""
        raise BadRequest(f"{job.id} is {job.status}, so it has no content{why}{soon}")
    if not 0 <= index < len(job.outputs):
        raise BadRequest(f"index must be below {len(job.outputs)}, got {index}", "index")
    output = job.outputs[index]
    size, etag = output.num_bytes, f'"{output.file}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f'inline; filename="{job.id}.{output.file.rpartition(".")[2]}"',
    }
    part = _part(request, size, etag)
    start, end = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if start >= end:
        refused = BadCall(f"Range: {request.headers['range'][:100]} lies outside of {size} bytes")
        return JSONResponse(refused.body(), NOT_SATISFIABLE, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Length"] = str(end - start)
    await jobs.check_file(job.id, output.file)
    files = await jobs.open_files()
    pieces: Iterator[bytes] = files.pieces(job.id, output.file, start, end)
    return StreamingResponse(
        iterate_in_threadpool(pieces), 200 if part is None else 206, headers, media_type=output.media_type
    )


def _part(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """(start, end) of what is asked for, which may be of no byte; None: all of it."""
    asked = RANGE.fullmatch(request.headers.get("range", "").strip())
    if asked is None or asked.groups() == ("", "") or request.headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    if not first:  # the last so many
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1 if last else size)

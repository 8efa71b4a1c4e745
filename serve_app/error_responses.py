"""The errors that any call may answer with, for the API's description."""

from typing import Any

from serve_app.openai_api import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it",
        401: "No key, or none that opens, where this server asks for one",
        404: "Unknown model, adapter or job",
        413: "The body is too long",
        429: "Too many requests in progress, or jobs that wait, or more than the key may ask for; see Retry-After",
        500: "A stage failed",
        503: "A stage cannot serve now; see Retry-After",
        504: "Not done within the deadline",
    }.items()
}

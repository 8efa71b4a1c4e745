"""The errors that any call may answer with, for the API's description."""

from typing import Any

from serve_app.http.openai_answers import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it",
        401: "This server requires a key, and the request has none or an invalid one",
        404: "Unknown model, adapter or job",
        413: "The body is too long",
        429: "Too many in progress, a deadline that cannot be met, or a key's limit reached; see Retry-After",
        500: "A stage failed",
        503: "A stage cannot serve now; see Retry-After",
        504: "Not done within the deadline",
    }.items()
}

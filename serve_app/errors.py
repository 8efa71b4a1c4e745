"""Everything that can go wrong, as clients see it.

RelayError
├── BadCall           4xx  no such path or method, or a body that cannot be read
├── BadRequest        400  a field of the body is wrong; names it
├── Unauthorized      401  no key, or none that opens; WWW-Authenticate
├── UnknownModel      404
├── UnknownJob        404
├── Overloaded        429  too many requests are in progress; Retry-After
├── OverLimit         429  more than the key may ask for; Retry-After says when it may again
│   └── OverBudget    429  what the key may cost is used up; repeating it soon is in vain
├── ClientLeft        499  nobody is there to be answered: for the log
├── StageFailed       500  a stage raised; not worth repeating
│   ├── OutOfMemory   500  a stage took more than its share of the GPU's memory
│   └── NonFinite     500  what a stage made is NaN or infinite
├── Unavailable       503  a stage cannot serve right now; Retry-After
└── DeadlineExceeded  504  not done within request_timeout_s
"""

import logging
import reprlib
from typing import Any, ClassVar

log = logging.getLogger("ray.serve")

MAX_QUOTED_CHARACTERS = 100
"""Of what a client sent, in an answer or a log line."""
_MAX_REPR = MAX_QUOTED_CHARACTERS + 2
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_QUOTED_CHARACTERS


def quoted(value: Any) -> str:
    """What a client sent, for a message: on one line, printable, and cut in its middle."""
    text = _repr.repr(value)
    return text if len(text) <= _MAX_REPR else f"{text[:_MAX_REPR]}…"


def named(name: str) -> str:
    """Like `quoted`, but an ordinary name stays as it is."""
    is_ordinary = name.isascii() and name.isprintable() and len(name) <= MAX_QUOTED_CHARACTERS
    return name if is_ordinary else quoted(name)


class RelayError(Exception):
    """Base of all errors a client may get. Survives pickling: every argument goes to `Exception`.

    message and param are attributes of the instance alone: what Ray raises at the other end of a handle
    inherits this class's attributes, and asks the original only for what it lacks.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        message = self.message.encode(errors="backslashreplace").decode()  # half characters cannot be sent
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """OpenAI's client repeats every 5xx twice, unless told by `x-should-retry` that it is in vain."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(self.retry_after_s)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


class BadCall(RelayError):
    status = 400
    kind = "invalid_request_error"


class BadRequest(RelayError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(RelayError):
    status = 401
    kind = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class UnknownModel(RelayError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, message: str, param: str | None = "model") -> None:
        super().__init__(message, param)


class UnknownJob(RelayError):
    status = 404
    kind = "invalid_request_error"
    code = "job_not_found"


class Overloaded(RelayError):
    status = 429
    kind = "rate_limit_error"
    code = "overloaded"
    retry_after_s = 5


class OverLimit(RelayError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, wait_s: int) -> None:
        super().__init__(message)
        self.args = (message, wait_s)
        self.wait_s = wait_s

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.wait_s)}


class OverBudget(OverLimit):
    kind = "insufficient_quota"
    code = "insufficient_quota"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"x-should-retry": "false"}


class ClientLeft(RelayError):
    status = 499
    kind = "invalid_request_error"
    code = "client_left"


class StageFailed(RelayError):
    code = "stage_failed"


class OutOfMemory(StageFailed):
    code = "out_of_memory"


class NonFinite(StageFailed):
    code = "not_finite"


class Unavailable(RelayError):
    status = 503
    code = "unavailable"
    retry_after_s = 5


class DeadlineExceeded(RelayError):
    status = 504
    code = "deadline_exceeded"


def as_relay_error(error: Exception) -> RelayError:
    """What nobody foresaw is logged, and told as a StageFailed."""
    if isinstance(error, RelayError):
        return error
    log.error("a request failed", exc_info=error)
    return StageFailed(f"internal error: {type(error).__name__}: {error}")

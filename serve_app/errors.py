"""Everything that can go wrong, as clients see it.

RelayError
├── BadCall           4xx  no such path or method, or a body that cannot be read
├── BadRequest        400  a field of the body is wrong; names it
├── Unauthorized      401  no key, or an invalid one; WWW-Authenticate
├── UnknownModel      404
├── UnknownJob        404
├── Overloaded        429  too many requests are in progress; Retry-After
│   └── DeadlineUnmeetable 429  the request cannot meet its deadline, so it is not started; Retry-After
├── OverLimit         429  more than the key allows; Retry-After says when it allows more
│   └── OverBudget    429  the key's budget is used up; retrying soon is useless
├── ClientLeft        499  the client has disconnected: for the log
├── StageFailed       500  a stage raised; not worth retrying
│   ├── OutOfDeviceMemory 500  a stage took more than its share of the GPU's memory
│   └── NonFinite     500  the output of a stage is NaN or infinite
├── Unavailable       503  a stage cannot serve right now; Retry-After
└── DeadlineExceeded  504  not done within request_timeout_s, or the request's own deadline_s
"""

import logging
import math
import reprlib
from typing import Any, ClassVar

log = logging.getLogger("ray.serve")

MAX_QUOTED_CHARACTERS = 100
"""Maximum number of characters of a client's input that an answer or a log line quotes."""
UNMEASURED_WAIT_S = 5.0
MAX_WAIT_S = 300.0
"""Upper bound of Retry-After, because longer forecasts are unreliable."""
_MAX_REPR = MAX_QUOTED_CHARACTERS + 2
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_QUOTED_CHARACTERS


def quoted(value: Any) -> str:
    """Returns a client's input for a message: on one line, printable, and shortened in the middle."""
    text = _repr.repr(value)
    return text if len(text) <= _MAX_REPR else f"{text[:_MAX_REPR]}…"


def named(name: str) -> str:
    """Like `quoted`, but returns an ordinary name unchanged."""
    is_ordinary = name.isascii() and name.isprintable() and len(name) <= MAX_QUOTED_CHARACTERS
    return name if is_ordinary else quoted(name)


class RelayError(Exception):
    """Base of all errors that a client may get. Can be pickled, because every argument goes to `Exception`.

    message and param are attributes of instances only: the error that Ray raises at the other end of a handle
    inherits this class's attributes, and reads from the original only what it lacks.
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
        """Returns the error in OpenAI's form."""
        message = self.message.encode(errors="backslashreplace").decode()  # lone surrogates cannot be encoded
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Returns the headers. OpenAI's client retries every 5xx twice, unless `x-should-retry` says that it is
        useless."""
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
    """Too many requests are in progress. Retry-After is not jittered: clients that return at the same time get the
    free places, and refusing the others again costs little."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        """wait_s: seconds until there is likely room; None: no measurement to estimate it from."""
        super().__init__(message)
        self.args = (message, wait_s)
        self.wait_s = wait_s

    def headers(self) -> dict[str, str]:
        wait_s = UNMEASURED_WAIT_S if self.wait_s is None else self.wait_s
        return {"Retry-After": str(math.ceil(min(max(wait_s, 1.0), MAX_WAIT_S)))}


class DeadlineUnmeetable(Overloaded):
    code = "deadline_unmeetable"


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


class OutOfDeviceMemory(StageFailed):
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
    """Returns a RelayError unchanged; logs any other error and returns it as StageFailed."""
    if isinstance(error, RelayError):
        return error
    log.error("a request failed", exc_info=error)
    return StageFailed(f"internal error: {type(error).__name__}: {error}")

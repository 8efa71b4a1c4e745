"""Errors of the stages. Torch-free, because the ingress maps them to HTTP statuses (`serve_app/errors.py`)."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class StageError(Exception):
    """A stage's error whose message gives the reason.

    Set `message` on the instance: Ray re-raises a subclass, and a class attribute would hide the original's value.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ExceedsMemory(StageError):
    """The request needs more memory than its stage may ever have; a smaller one may fit. Nothing was computed."""


class OutOfDeviceMemory(StageError):
    """A call took more than its stage's share of GPU memory. Only the call failed: all processes keep running."""


class OutOfTime(StageError):
    """The request can no longer meet its deadline, so it is ended before it takes more GPU time."""


class NotBegun(Exception):
    """The request has waited at this replica for a while and not begun; another replica may have less to do."""


class NonFinite(StageError):
    """Embeddings, latents or pixels are NaN or infinite, so there is no image to return."""


class WrongField(Exception):
    """A field of the request is wrong. `param` is the field's name."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param)
        self.message, self.param = message, param


class CannotServe(Exception):
    """Raised at start if the stage could never serve the requests that it will get."""


class ShardGroupLost(Exception):
    """A rank died or got stuck. The request may be retried: another replica will serve it."""


@contextmanager
def raised_in(stage: str) -> Iterator[None]:
    """Sets `stage` on an exception, because Ray raises it again in calls that take this call's result."""
    try:
        yield
    except Exception as error:
        error.stage = stage  # type: ignore[attr-defined]
        raise


def describe_cause(error: BaseException) -> str:
    """Returns the error in one line; if it has no text, the line says where it was raised."""
    text = " ".join(str(error).split()).rstrip(".")
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"in {frame.name}, at `{frame.line}`"
    return f"{type(error).__name__}: {text}"

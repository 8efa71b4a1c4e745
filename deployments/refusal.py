"""What a stage answers to a request that it cannot serve. Torch-free: the ingress tells these errors apart."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class NeverFits(Exception):
    """The request needs more than its stage may ever have: a smaller one may fit. Nothing was computed.

    message is the instance's alone: what Ray raises at the other end of a handle inherits this class's attributes,
    and asks the original only for what it lacks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class OutOfShare(Exception):
    """A call took more than its stage's share of the GPU. It failed alone: the process and its neighbours live."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFinite(Exception):
    """Embeddings, latents or pixels came out as NaN or infinite: there is no picture to answer with."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class WrongField(Exception):
    """The request's own fields are at fault, whatever the model would have answered."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param)
        self.message, self.param = message, param


class CannotServe(Exception):
    """At start: what this stage will be asked to do it cannot do, whatever the request."""


class ShardGroupLost(Exception):
    """A rank died or got stuck. The request may be repeated: another replica will serve it."""


@contextmanager
def raised_in(stage: str) -> Iterator[None]:
    """Notes the stage on whatever is raised: by Ray, the call that was given its answer raises it once more."""
    try:
        yield
    except Exception as error:
        error.stage = stage  # type: ignore[attr-defined]
        raise


def describe_cause(error: BaseException) -> str:
    """In one line; of an error without a word, where it arose."""
    text = " ".join(str(error).split()).rstrip(".")
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"in {frame.name}, at `{frame.line}`"
    return f"{type(error).__name__}: {text}"

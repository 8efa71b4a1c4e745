"""Retries of a call whose stage was lost: the same call is made again until it is answered or the deadline has
passed.

Serve does not retry a request that it has accepted, so this module does: requests are seeded, hence idempotent.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TypeVar

from ray.exceptions import (
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deployments import errors as stage_errors
from deployments.errors import ExceedsMemory, OutOfTime, ShardGroupLost, WrongField
from serve_app.errors import BadRequest, DeadlineExceeded, NonFinite, OutOfDeviceMemory, Overloaded, StageFailed
from serve_app.flow.isolation import PoisonIsolation

log = logging.getLogger("ray.serve")

MAX_SHARED_LOSSES = 2
"""One loss is an accident: all affected requests are retried together. After a second one, an affected request may
be the cause, a poison request: from then on it is retried in isolation."""
MAX_ISOLATED_LOSSES = 2
"""After this many losses in isolation the request itself is the cause. The first may be the fault of a poison
request that is not isolated yet."""
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 2.0

AWAY = (DeploymentUnavailableError, ReplicaUnavailableError, ActorUnavailableError)
"""No replica took the call. A replacement may still be loading, so the call is repeated until the deadline."""
INPUT_LOST = (RayTaskError, RayServeException, ObjectLostError)
"""If one of these reports a loss, the replica itself is alive, because a dead replica cannot raise. Its input is
lost, by the death of the previous stage or of the node that stored the input."""
LOST = (RayActorError, RayServeException, ObjectLostError, RaySystemError, ShardGroupLost)
"""A process or an object is gone: if the call is repeated, another replica will serve it."""

Answer = TypeVar("Answer")


class StageLost(Exception):
    """A stage or its input is gone. Clients never see this error."""

    def __init__(self, stage: str, cause: BaseException, *, was_served: bool) -> None:
        super().__init__(stage, cause, was_served)
        self.was_served = was_served

    def __str__(self) -> str:
        stage, cause, _ = self.args
        return f"the {stage} stage was lost ({_first_line(cause)})"


@contextmanager
def translating_errors(
    stage: str, *, param: str, if_input_lost: Callable[[], None] | None = None
) -> Iterator[None]:
    """Context of a call of the stage: converts its errors to those that clients may see, and its loss to
    StageLost.

    param: the field to blame if the request needs more memory than the stage has.
    if_input_lost: called when the stage's input, made by another stage, is lost.
    """
    try:
        yield
    except WrongField as error:
        raise BadRequest(f"{error.param}: {error.message}", error.param) from error
    except ExceedsMemory as error:
        raise BadRequest(f"{param}: in the {_where(error, stage)} stage {error.message}", param) from error
    except stage_errors.OutOfDeviceMemory as error:
        raise OutOfDeviceMemory(f"the {_where(error, stage)} stage is {error.message}") from error
    except OutOfTime as error:
        raise DeadlineExceeded(error.message) from error
    except stage_errors.NonFinite as error:
        raise NonFinite(f"the {_where(error, stage)} stage: {error.message}") from error
    except BackPressureError as error:
        raise Overloaded(f"too many calls wait for the {stage} stage") from error
    except AWAY as error:
        raise StageLost(stage, error, was_served=False) from error
    except LOST as error:
        is_input_lost = isinstance(error, INPUT_LOST) and not isinstance(error, ShardGroupLost)
        if is_input_lost and if_input_lost is not None:
            if_input_lost()
        raise StageLost(stage, error, was_served=True) from error
    except RayError as error:
        raise StageFailed(f"the {_where(error, stage)} stage failed: {_last_line(error)}") from error


async def retry_when_lost(call: Callable[[], Awaitable[Answer]], isolation: PoisonIsolation) -> Answer:
    """Repeats the call until it is answered, or the caller's deadline ends it. Raises StageFailed if the request
    seems to cause the losses."""
    num_lost, backoff_s = 0, FIRST_BACKOFF_S
    for attempt in count(2):
        try:
            async with nullcontext() if num_lost < MAX_SHARED_LOSSES else isolation.held():
                return await call()
        except StageLost as loss:
            num_lost += loss.was_served
            if num_lost == MAX_SHARED_LOSSES + MAX_ISOLATED_LOSSES:
                raise StageFailed(
                    f"{loss}, {num_lost} times while it served this request, the last time alone: the request "
                    "seems to be the cause, for instance because it needs more memory than there is; ask for less"
                ) from loss
            log.warning("%s; attempt %d follows", loss, attempt)
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
    raise AssertionError("unreachable")


def _where(error: BaseException, stage: str) -> str:
    """Returns the stage that raised the error: a call whose input is another stage's answer raises that stage's
    error."""
    return str(getattr(error, "stage", stage))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _last_line(error: BaseException) -> str:
    """Returns the last line: a Ray task error contains the remote traceback, whose last line names the cause."""
    return str(error).strip().rpartition("\n")[2]

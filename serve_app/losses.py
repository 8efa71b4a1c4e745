"""What is done about a stage that is lost: the same call again, until it is answered or the deadline is over.

Serve does not repeat a request it has accepted, so this does: the request is seeded, hence idempotent.
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
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError

from deployments.refusal import NeverFits, NotFinite, OutOfShare, ShardGroupLost, WrongField
from serve_app.errors import BadRequest, NonFinite, OutOfMemory, StageFailed
from serve_app.suspects import Suspects

log = logging.getLogger("ray.serve")

LOSSES_TOGETHER = 2
"""One is an accident, and whoever was there is repeated together with the others. Of those that were there twice,
one may be the cause: from then on they are repeated alone."""
LOSSES_ALONE = 2
"""Then it is the request that kills. The first may be another's fault: of one that is no suspect yet."""
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 2.0

AWAY = (DeploymentUnavailableError, ReplicaUnavailableError, ActorUnavailableError)
"""Nobody took the call; a replacement may still be loading, so this is repeated up to the deadline."""
INPUT_LOST = (RayTaskError, RayServeException, ObjectLostError)
"""Where these tell of a loss, the replica itself lives: a replica that died cannot raise. What it was given is
gone, by the death of the stage before or of the node that kept it."""
LOST = (RayActorError, RayServeException, ObjectLostError, RaySystemError, ShardGroupLost)
"""A process or an object is gone: the same call, made again, will be served by another replica."""

Answer = TypeVar("Answer")


class StageLost(Exception):
    """A stage, or what it was given, is gone. Clients never see it."""

    def __init__(self, stage: str, cause: BaseException, *, was_served: bool) -> None:
        super().__init__(stage, cause, was_served)
        self.was_served = was_served

    def __str__(self) -> str:
        stage, cause, _ = self.args
        return f"the {stage} stage was lost ({_first_line(cause)})"


@contextmanager
def naming(stage: str, *, param: str, if_input_lost: Callable[[], None] | None = None) -> Iterator[None]:
    """A call of the stage: its errors as clients may see them, its loss as StageLost.

    param: the field to blame where the request needs more memory than the stage has.
    if_input_lost: for a stage that was given what another one made.
    """
    try:
        yield
    except WrongField as error:
        raise BadRequest(f"{error.param}: {error.message}", error.param) from error
    except NeverFits as error:
        raise BadRequest(f"{param}: in the {_where(error, stage)} stage {error.message}", param) from error
    except OutOfShare as error:
        raise OutOfMemory(f"the {_where(error, stage)} stage is {error.message}") from error
    except NotFinite as error:
        raise NonFinite(f"the {_where(error, stage)} stage: {error.message}") from error
    except AWAY as error:
        raise StageLost(stage, error, was_served=False) from error
    except LOST as error:
        is_input_lost = isinstance(error, INPUT_LOST) and not isinstance(error, ShardGroupLost)
        if is_input_lost and if_input_lost is not None:
            if_input_lost()
        raise StageLost(stage, error, was_served=True) from error
    except RayError as error:
        raise StageFailed(f"the {_where(error, stage)} stage failed: {_last_line(error)}") from error


async def repeat_when_lost(call: Callable[[], Awaitable[Answer]], suspects: Suspects) -> Answer:
    """Call until it is answered, or the caller's deadline ends it. Raises StageFailed if it is what kills."""
    num_lost, backoff_s = 0, FIRST_BACKOFF_S
    for attempt in count(2):
        try:
            async with nullcontext() if num_lost < LOSSES_TOGETHER else suspects.alone():
                return await call()
        except StageLost as loss:
            num_lost += loss.was_served
            if num_lost == LOSSES_TOGETHER + LOSSES_ALONE:
                raise StageFailed(
                    f"{loss}, {num_lost} times while it served this request, at last with no other in question: "
                    "the request seems to end it, as one does that needs more memory than there is; ask for less"
                ) from loss
            log.warning("%s; attempt %d follows", loss, attempt)
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
    raise AssertionError("unreachable")


def _where(error: BaseException, stage: str) -> str:
    """The stage in which it was raised: a call that is given another's answer raises what that one raised."""
    return str(getattr(error, "stage", stage))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _last_line(error: BaseException) -> str:
    """A Ray task error carries the remote traceback; its last line names the cause."""
    return str(error).strip().rpartition("\n")[2]

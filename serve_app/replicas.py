"""What Serve and every replica of a stage tell of it. Nothing here raises: what is amiss is told."""

import asyncio
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState

OK, ASLEEP, WAKING = "ok", "asleep", "waking"
SERVING = (OK, ASLEEP, WAKING)
"""A request that comes now will be served."""
UNKNOWN = "UNKNOWN"
PING_TIMEOUT_S = 1.0
STATS_TIMEOUT_S = 5.0
MAX_MESSAGE_CHARACTERS = 400

_threads = ThreadPoolExecutor(8, thread_name_prefix="replicas")
"""Ray's calls block; the event loop's own threads are for requests."""


@dataclass(frozen=True)
class StageStatus:
    """One stage, now."""

    state: str
    """As Serve calls it: HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY, DEPLOY_FAILED, … or UNKNOWN."""
    message: str
    """What Serve says of it, if it says anything, or how many replicas do not answer."""
    num_replicas: Mapping[str, int]
    """By Serve's state of them: RUNNING, STARTING, STOPPING, …"""
    replicas: tuple[Any, ...]
    """What each replica that answers tells of itself: a class of deployments/stats.py."""


@dataclass(frozen=True)
class Told:
    """What Serve says of one deployment."""

    state: str
    message: str = ""
    num_replicas: Mapping[str, int] = field(default_factory=dict)
    takes_turns: bool = False
    """With stages of other models, in room that not all have at once: so it may wait for it."""

    @property
    def at_rest(self) -> str | None:
        """ASLEEP or WAKING of a stage that scales to zero: no replica runs, and none has to."""
        there = {state for state, number in self.num_replicas.items() if number}
        if self.state in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
            return None if there - {ReplicaState.STOPPING} else ASLEEP
        wakes = self.state == DeploymentStatus.UPSCALING and ReplicaState.RUNNING not in there
        return WAKING if wakes and (self.takes_turns or not self.message) else None


async def stage_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """By the same names. A stage that sleeps is not woken."""
    told, *answers = await asyncio.gather(
        _in_thread(_ask_serve, stages),
        *(_in_thread(_ask_all, handle, "stats", STATS_TIMEOUT_S) for handle in stages.values()),
    )
    return {name: _stage_status(told[name], of) for name, of in zip(stages, answers, strict=True)}


def no_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """For as long as nothing was heard of any."""
    return dict.fromkeys(stages, StageStatus(UNKNOWN, "nothing was heard of it so far", {}, ()))


def _stage_status(told: Told, answers: list[Any]) -> StageStatus:
    num_silent = sum(isinstance(answer, TimeoutError) for answer in answers)
    silence = f"{num_silent} did not answer: as many requests as max_ongoing_requests, or stuck"
    return StageStatus(
        told.state,
        told.message or (silence if num_silent else ""),
        told.num_replicas,
        tuple(answer for answer in answers if not isinstance(answer, BaseException)),
    )


async def stage_health(stages: Mapping[str, DeploymentHandle], turns: Collection[str] = ()) -> dict[str, str]:
    """By the same names one of SERVING, or why the stage cannot serve now. turns: which take turns with others."""
    told = await _in_thread(_ask_serve, stages, turns)
    found = await asyncio.gather(*(_health(told[name], handle) for name, handle in stages.items()))
    if all(state in SERVING for state in found):
        return dict(zip(stages, found, strict=True))
    now = await _in_thread(_ask_serve, stages, turns)  # a stage may have fallen asleep since
    return {
        name: state if state in SERVING else now[name].at_rest or _with_message(state, now[name].message)
        for name, state in zip(stages, found, strict=True)
    }


async def _health(told: Told, handle: DeploymentHandle) -> str:
    """Asks the replicas, for Serve is seconds late to see that one died. One that is full has no room for the
    question, and may be silent; whether it is stuck instead, Serve's own checks tell: they need no room.
    """
    if told.at_rest is not None:
        return told.at_rest  # not asked, for a call would wake it
    answers = await _in_thread(_ask_all, handle, "ping", PING_TIMEOUT_S)
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(faults) < len(answers):
        return OK
    if not faults or isinstance(faults[0], DeploymentUnavailableError):
        return "no replica is ready"
    if any(isinstance(fault, TimeoutError) for fault in faults):
        is_full = told.num_replicas.get(ReplicaState.RUNNING, 0) and told.state != DeploymentStatus.UNHEALTHY
        return OK if is_full else f"no answer within {PING_TIMEOUT_S:g} s"
    return _last_line(f"{type(faults[0]).__name__}: {faults[0]}".partition("\n")[0])


def _with_message(state: str, message: str) -> str:
    return f"{state}: {message}" if message else state


def _ask_serve(stages: Mapping[str, DeploymentHandle], turns: Collection[str] = ()) -> dict[str, Told]:
    try:
        applications = serve.status().applications
    except Exception as error:  # whatever it is, Serve tells nothing now
        unheard = Told(UNKNOWN, _last_line(f"Serve's controller does not answer: {type(error).__name__}: {error}"))
        return dict.fromkeys(stages, unheard)
    return {
        name: replace(_told(applications.get(handle.app_name), handle), takes_turns=name in turns)
        for name, handle in stages.items()
    }


def _told(application: Any, handle: DeploymentHandle) -> Told:
    """After a failed deploy Serve may tell of the application alone, while the old replicas serve on."""
    if application is None:
        return Told(UNKNOWN, f"Serve knows no application {handle.app_name!r}")
    of = application.deployments.get(handle.deployment_name)
    if of is None:
        message = application.message or f"Serve knows no deployment {handle.deployment_name!r}"
        return Told(str(application.status.value), _last_line(message))
    states = {str(ReplicaState(state).value): number for state, number in of.replica_states.items()}
    return Told(str(of.status.value), _last_line(of.message), states)


def _last_line(message: str) -> str:
    """Where a traceback names its cause; cut."""
    line = message.strip().rpartition("\n")[2]
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[: MAX_MESSAGE_CHARACTERS - 1] + "…"


def _ask_all(handle: DeploymentHandle, method: str, timeout_s: float) -> list[Any]:
    """An answer or an error of each replica. Not `results_async`, whose timeout loses all answers for one."""
    try:
        answers: list[Any] = handle.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:  # whatever it is, no replica answers
        return [error]
    return answers


async def _in_thread(call: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, call, *args)

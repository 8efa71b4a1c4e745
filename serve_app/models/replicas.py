"""The state of stages, as Serve and their replicas report it. Nothing here raises: failures are part of the
report."""

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
"""States in which a new request will be served."""
UNKNOWN = "UNKNOWN"
PING_TIMEOUT_S = 1.0
STATS_TIMEOUT_S = 5.0
MAX_MESSAGE_CHARACTERS = 400

_threads = ThreadPoolExecutor(8, thread_name_prefix="replicas")
"""Threads for Ray's blocking calls; those of the event loop are for requests."""


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage at the time of the call."""

    state: str
    """Serve's name of it: HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY, DEPLOY_FAILED, … or UNKNOWN."""
    message: str
    """Serve's message, if there is one, or how many replicas do not answer."""
    num_replicas: Mapping[str, int]
    """By Serve's state of the replicas: RUNNING, STARTING, STOPPING, …"""
    replicas: tuple[Any, ...]
    """The report of each replica that answers: a class of deployments/stages/stats.py."""


@dataclass(frozen=True)
class Told:
    """What Serve reports about one deployment."""

    state: str
    message: str = ""
    num_replicas: Mapping[str, int] = field(default_factory=dict)
    may_sleep: bool = False
    """Whether it shares resources with stages of other models that do not all fit at once, so it may wait for
    room."""

    @property
    def at_rest(self) -> str | None:
        """ASLEEP or WAKING for a stage that scales to zero: no replica runs, and none has to. Else None."""
        there = {state for state, number in self.num_replicas.items() if number}
        if self.state in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
            return None if there - {ReplicaState.STOPPING} else ASLEEP
        wakes = self.state == DeploymentStatus.UPSCALING and ReplicaState.RUNNING not in there
        return WAKING if wakes and (self.may_sleep or not self.message) else None


async def stage_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """Returns the status of each stage, by the same names. Does not wake a sleeping stage."""
    told, *answers = await asyncio.gather(
        _in_thread(_ask_serve, stages),
        *(_in_thread(_ask_all, handle, "stats", STATS_TIMEOUT_S) for handle in stages.values()),
    )
    return {name: _stage_status(told[name], of) for name, of in zip(stages, answers, strict=True)}


def no_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """Returns the statuses for the time before anything has been reported."""
    return dict.fromkeys(stages, StageStatus(UNKNOWN, "it has not reported yet", {}, ()))


def _stage_status(told: Told, answers: list[Any]) -> StageStatus:
    num_silent = sum(isinstance(answer, TimeoutError) for answer in answers)
    silence = f"{num_silent} did not answer: full (max_ongoing_requests) or stuck"
    return StageStatus(
        told.state,
        told.message or (silence if num_silent else ""),
        told.num_replicas,
        tuple(answer for answer in answers if not isinstance(answer, BaseException)),
    )


async def stage_health(stages: Mapping[str, DeploymentHandle], may_sleep: Collection[str] = ()) -> dict[str, str]:
    """Returns one of SERVING, or why the stage cannot serve now, by the same names. may_sleep: stages that may
    sleep."""
    told = await _in_thread(_ask_serve, stages, may_sleep)
    found = await asyncio.gather(*(_health(told[name], handle) for name, handle in stages.items()))
    if all(state in SERVING for state in found):
        return dict(zip(stages, found, strict=True))
    now = await _in_thread(_ask_serve, stages, may_sleep)  # a stage may have fallen asleep meanwhile
    return {
        name: state if state in SERVING else now[name].at_rest or _with_message(state, now[name].message)
        for name, state in zip(stages, found, strict=True)
    }


async def _health(told: Told, handle: DeploymentHandle) -> str:
    """Asks the replicas, because Serve notices a death seconds late. A full replica has no room for the call and
    may not answer; whether it is stuck instead is left to Serve's own checks, which need no room."""
    if told.at_rest is not None:
        return told.at_rest  # not asked, because a call would wake the stage
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


def _ask_serve(stages: Mapping[str, DeploymentHandle], may_sleep: Collection[str] = ()) -> dict[str, Told]:
    try:
        applications = serve.status().applications
    except Exception as error:  # whatever the error, Serve reports nothing now
        unheard = Told(UNKNOWN, _last_line(f"Serve's controller does not answer: {type(error).__name__}: {error}"))
        return dict.fromkeys(stages, unheard)
    return {
        name: replace(_told(applications.get(handle.app_name), handle), may_sleep=name in may_sleep)
        for name, handle in stages.items()
    }


def _told(application: Any, handle: DeploymentHandle) -> Told:
    """Returns Serve's report about the deployment. After a failed deploy Serve may report only on the application,
    while the old replicas serve on."""
    if application is None:
        return Told(UNKNOWN, f"Serve knows no application {handle.app_name!r}")
    of = application.deployments.get(handle.deployment_name)
    if of is None:
        message = application.message or f"Serve knows no deployment {handle.deployment_name!r}"
        return Told(str(application.status.value), _last_line(message))
    states = {str(ReplicaState(state).value): number for state, number in of.replica_states.items()}
    return Told(str(of.status.value), _last_line(of.message), states)


def _last_line(message: str) -> str:
    """Returns the last line, where a traceback names its cause; shortened."""
    line = message.strip().rpartition("\n")[2]
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[: MAX_MESSAGE_CHARACTERS - 1] + "…"


def _ask_all(handle: DeploymentHandle, method: str, timeout_s: float) -> list[Any]:
    """Returns an answer or an error of each replica. Does not use `results_async`, whose timeout loses all answers
    because of one."""
    try:
        answers: list[Any] = handle.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:  # whatever the error, no replica answers
        return [error]
    return answers


async def _in_thread(call: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, call, *args)

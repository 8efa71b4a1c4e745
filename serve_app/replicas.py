"""What Serve and every replica of a stage tell of it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState

OK, ASLEEP = "ok", "asleep"
PING_TIMEOUT_S = 1.0
STATS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class StageStatus:
    """One stage, now."""

    state: str
    """As Serve calls it: HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY, …"""
    message: str
    """What Serve says of it, if it says anything, or how many replicas do not answer."""
    num_replicas: Mapping[str, int]
    """By Serve's state of them: RUNNING, STARTING, STOPPING, …"""
    replicas: tuple[Any, ...]
    """What each replica that answers tells of itself: a class of deployments/stats.py."""


async def stage_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """By the same names. A stage that sleeps is not woken."""
    told, *answers = await asyncio.gather(
        asyncio.to_thread(_deployments, stages),
        *(asyncio.to_thread(_ask_all, handle, "stats", STATS_TIMEOUT_S) for handle in stages.values()),
    )
    return {name: _stage_status(told[name], of) for name, of in zip(stages, answers, strict=True)}


def _stage_status(told: Any, answers: list[Any]) -> StageStatus:
    num_silent = sum(isinstance(answer, TimeoutError) for answer in answers)
    silence = f"{num_silent} did not answer: as many requests as max_ongoing_requests, or stuck"
    return StageStatus(
        told.status.value,
        told.message or (silence if num_silent else ""),
        dict(told.replica_states),
        tuple(answer for answer in answers if not isinstance(answer, BaseException)),
    )


async def stage_health(stages: Mapping[str, DeploymentHandle]) -> dict[str, str]:
    """By the same names OK, ASLEEP, or why the stage cannot serve now."""
    told = await asyncio.to_thread(_deployments, stages)
    found = await asyncio.gather(*(_health(told[name], handle) for name, handle in stages.items()))
    return dict(zip(stages, found, strict=True))


async def _health(told: Any, handle: DeploymentHandle) -> str:
    """Asks the replicas, for Serve is seconds late to see that one died. One that is full has no room for the
    question, and may be silent; whether it is stuck instead, Serve's own checks tell: they need no room.
    """
    if told is not None and told.status == DeploymentStatus.HEALTHY and not any(told.replica_states.values()):
        return ASLEEP  # not asked, for a call would wake it
    answers = await asyncio.to_thread(_ask_all, handle, "ping", PING_TIMEOUT_S)
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(faults) < len(answers):
        return OK
    if not faults or isinstance(faults[0], DeploymentUnavailableError):
        return "no replica is ready"
    if any(isinstance(fault, TimeoutError) for fault in faults):
        runs = told is not None and told.replica_states.get(ReplicaState.RUNNING, 0) > 0
        is_full = runs and told.status != DeploymentStatus.UNHEALTHY
        return OK if is_full else f"no answer within {PING_TIMEOUT_S:g} s"
    return f"{type(faults[0]).__name__}: {faults[0]}".partition("\n")[0]


def _deployments(stages: Mapping[str, DeploymentHandle]) -> dict[str, Any]:
    """What Serve tells of each; None of one that it does not know."""
    applications = serve.status().applications
    return {
        name: applications[handle.app_name].deployments.get(handle.deployment_name)
        for name, handle in stages.items()
    }


def _ask_all(handle: DeploymentHandle, method: str, timeout_s: float) -> list[Any]:
    """An answer or an error of each replica. Not `results_async`, whose timeout loses all answers for one."""
    try:
        answers: list[Any] = handle.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:  # whatever it is, no replica answers
        return [error]
    return answers

"""What Serve and every replica of a stage tell of it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus


@dataclass(frozen=True)
class StageStatus:
    """One stage, now."""

    state: str
    """As Serve calls it: HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY, …"""
    message: str
    """What Serve says of it, if it says anything."""
    num_replicas: Mapping[str, int]
    """By Serve's state of them: RUNNING, STARTING, STOPPING, …"""
    replicas: tuple[Any, ...]
    """What each running replica tells of itself: a class of deployments/stats.py."""


async def stage_statuses(stages: Mapping[str, DeploymentHandle]) -> dict[str, StageStatus]:
    """By the same names. A stage that sleeps is not woken."""
    applications, *replicas = await asyncio.gather(
        asyncio.to_thread(lambda: serve.status().applications), *map(_ask_all, stages.values())
    )
    return {
        name: _stage_status(applications, handle, of)
        for (name, handle), of in zip(stages.items(), replicas, strict=True)
    }


async def sleeping(stages: Mapping[str, DeploymentHandle]) -> set[str]:
    """Which of them have no replica and need none until a request comes."""
    applications = await asyncio.to_thread(lambda: serve.status().applications)
    return {name for name, handle in stages.items() if _sleeps(applications, handle)}


def _sleeps(applications: Mapping[str, Any], handle: DeploymentHandle) -> bool:
    told = applications[handle.app_name].deployments.get(handle.deployment_name)
    return told is not None and told.status == DeploymentStatus.HEALTHY and not any(told.replica_states.values())


def _stage_status(
    applications: Mapping[str, Any], handle: DeploymentHandle, replicas: tuple[Any, ...]
) -> StageStatus:
    told = applications[handle.app_name].deployments[handle.deployment_name]
    return StageStatus(told.status.value, told.message, dict(told.replica_states), replicas)


async def _ask_all(handle: DeploymentHandle) -> tuple[Any, ...]:
    """One that is just dying has nothing to tell."""
    try:
        answers = await handle.broadcast("stats").results_async(return_exceptions=True)
    except DeploymentUnavailableError:
        return ()
    return tuple(answer for answer in answers if not isinstance(answer, BaseException))

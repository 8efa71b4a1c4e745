"""A stage's resources as Ray Serve deployment options. Imports no Ray, so that planning works without it."""

from dataclasses import dataclass
from typing import Any

from cluster.replicas.resources import ResourceConfig

STAGE_ENV = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # Ray warns that received tensors are read-only views; no stage writes to its inputs.
    "PYTHONWARNINGS": "ignore::UserWarning:ray._private.tensor_serialization_utils",
}
"""Set per stage and never for the whole job: the first variable makes a process import torch, which the ingress
must not (measured: a 100 MB hand-off takes 32 instead of 350 ms; without it the ingress takes 138 instead of
316 MB)."""
GPU_ENV = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Lets torch's allocator use, and release, the memory between two long-lived tensors: memory caps and time sharing
leave no room for fragmentation."""
NO_GPU_ENV = {"CUDA_VISIBLE_DEVICES": ""}
"""Hides all GPUs: Ray shows them to a process that requested none, and quantisation libraries use the first."""

PRELOAD_FIELD = "preload"
"""A field of Ray's `runtime_env`, for preload.py: [a function, as "module:name", its arguments]."""

HEAD_NODE = {"node:__internal_head__": 0.001}
"""A resource that Ray gives only to the head node."""

HEALTH_CHECKS = {"health_check_period_s": 2.0, "health_check_timeout_s": 10.0}
"""Three failed checks make a replica unhealthy: 6 s after it reports itself so, half a minute after it hangs."""

LEAST_LOADED_ROUTER = "cluster.replicas.least_loaded_router.LeastLoadedRouter"
SESSION_ROUTER = "cluster.replicas.session_router.SessionRouter"

METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 5.0
"""Serve's own 10 and 30 s would see a burst of short requests only when it is over."""
SLEEPER_LOOK_BACK_S = 2.0
"""Look-back of a stage that may sleep: for this long after its last request it still counts as busy."""


@dataclass(frozen=True)
class ScalingHints:
    """What the policy knows about a stage before anything has been measured."""

    request_s: float = 1.0
    """Seconds that a request takes one replica."""
    reports_load: bool = False
    """True: replicas report their load. False: the load is the number of ongoing requests."""
    shapes: tuple[dict[str, float], ...] = ()
    """Resources of a process, for each stage of the app."""


NO_HINTS = ScalingHints()


@dataclass(frozen=True)
class Sleeping:
    """How a stage that may have no replica sleeps: together with all other such stages of its model."""

    model: str = ""
    stages: tuple[str, ...] = ()
    """Names of the deployments of these stages."""
    starts_asleep: bool = False
    """Whether it stays unloaded until its first request."""


NOT_TOGETHER = Sleeping()


def plan_serve_options(
    resources: ResourceConfig,
    *,
    graceful_shutdown_timeout_s: float,
    max_queued_requests: int = -1,
    num_shards: int = 1,
    hints: ScalingHints = NO_HINTS,
    has_sessions: bool = False,
    preload: list[str] | None = None,
    sleeping: Sleeping = NOT_TOGETHER,
) -> dict[str, Any]:
    """Returns the keyword arguments of `Deployment.options` for one stage.

    With several shards the replica itself is rank 0 and is in bundle 0 of its placement group; ranks 1 to
    num_shards - 1 are child actors in the following bundles, each of the same size, on one node if they fit.

    Args:
        graceful_shutdown_timeout_s: how long a replica that is to stop may work on its last requests.
        max_queued_requests: calls that may wait in one caller for a replica with room; -1: any number.
        hints: for a stage that autoscales (autoscaling.py).
        has_sessions: whether calls with the same `session_id` go to the same replica while it has room.
        preload: what a fork server imports for the stage's processes (preload.py).
        sleeping: for a stage that may have no replica (sleeping.py).
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": resources.max_held_requests,
        "max_queued_requests": max_queued_requests,
        "graceful_shutdown_timeout_s": graceful_shutdown_timeout_s,
        **HEALTH_CHECKS,
        "ray_actor_options": {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "runtime_env": stage_environment(resources) | ({PRELOAD_FIELD: preload} if preload else {}),
        },
        **_plan_replicas(resources, num_shards, hints, sleeping),
    }
    if resources.most_replicas > 1:
        router = SESSION_ROUTER if has_sessions else LEAST_LOADED_ROUTER
        options["request_router_config"] = {"request_router_class": router}
    if num_shards == 1 and resources.label_selector:
        options["ray_actor_options"]["label_selector"] = resources.label_selector
    if num_shards > 1:
        options["placement_group_bundles"] = [resources.claim for _ in range(num_shards)]
        options["placement_group_strategy"] = "PACK"
        if resources.label_selector:
            options["placement_group_bundle_label_selector"] = [resources.label_selector] * num_shards
    return options


def stage_environment(resources: ResourceConfig) -> dict[str, Any]:
    """Returns Ray's `runtime_env` of a stage's processes."""
    return {"env_vars": STAGE_ENV | (GPU_ENV if resources.num_gpus else NO_GPU_ENV)}


def _plan_replicas(
    resources: ResourceConfig, num_shards: int, hints: ScalingHints, sleeping: Sleeping
) -> dict[str, Any]:
    if resources.min_replicas == resources.most_replicas:
        return {"num_replicas": resources.min_replicas}
    growth = {
        "resources": resources.claim,
        "num_ranks": num_shards,
        "labels": resources.label_selector,
        "shapes": list(hints.shapes),
        "request_s": hints.request_s,
        "is_auto": resources.is_auto,
        "reports_load": hints.reports_load,
        "downscale_delay_s": resources.downscale_delay_s,
    }
    autoscaling: dict[str, Any] = {
        "min_replicas": resources.min_replicas,
        "initial_replicas": max(1, resources.min_replicas),
        "max_replicas": resources.most_replicas,
        "target_ongoing_requests": resources.target_load,
        "upscale_delay_s": resources.upscale_delay_s,
        "downscale_delay_s": 0.0,  # the policy applies the delay, because a stage that gives way shrinks at once
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {"policy_function": "cluster.scaling.autoscaling:GrowPolicy", "policy_kwargs": growth},
    }
    if not resources.min_replicas:
        autoscaling |= _plan_sleep(growth, sleeping)
    return {"num_replicas": "auto", "autoscaling_config": autoscaling}


def _plan_sleep(growth: dict[str, Any], sleeping: Sleeping) -> dict[str, Any]:
    kwargs = {"model": sleeping.model, "stages": list(sleeping.stages), "growth": growth}
    return {
        "initial_replicas": 0 if sleeping.starts_asleep else 1,
        "look_back_period_s": SLEEPER_LOOK_BACK_S,
        "policy": {"policy_function": "cluster.scaling.sleeping:SleepPolicy", "policy_kwargs": kwargs},
    }

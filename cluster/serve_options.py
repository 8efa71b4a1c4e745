"""Resources of a stage as Ray Serve deployment options. Pure: imports no Ray, so it plans anywhere."""

from dataclasses import dataclass
from typing import Any

from cluster.resources import ResourceConfig

STAGE_ENV = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # Ray warns that tensors received so are read-only views; no stage writes to what it is given.
    "PYTHONWARNINGS": "ignore::UserWarning:ray._private.tensor_serialization_utils",
}
"""Set per stage, never job-wide: the first makes a process import torch, which the ingress must not
(measured: a 100 MB hand-off 350 -> 32 ms; ingress 316 -> 138 MB without it)."""
GPU_ENV = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Caps and turns leave no room for fragments: so torch's allocator can use, and give back, what lies between two
tensors that live on."""
NO_GPU_ENV = {"CUDA_VISIBLE_DEVICES": ""}
"""For who asks for none: Ray leaves it all of the node's, and libraries that quantise take the first they see."""

PRELOAD_FIELD = "preload"
"""Of Ray's `runtime_env`: [a function, as "module:name", its arguments], for preload.py."""

HEAD_NODE = {"node:__internal_head__": 0.001}
"""A resource that Ray gives to the head node alone."""

HEALTH_CHECKS = {"health_check_period_s": 2.0, "health_check_timeout_s": 10.0}
"""Three that fail make an unhealthy replica: 6 s after it said so, half a minute after it hung."""

SESSION_ROUTER = "cluster.session_router.SessionRouter"

METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 5.0
"""Serve's own 10 and 30 s would see a burst of short requests when it is over."""
SLEEPER_LOOK_BACK_S = 2.0
"""Of a stage that may have to make room: so long after its last request it still seems to have some."""


@dataclass(frozen=True)
class Sleeping:
    """How a stage that may have no replica goes about it: with all others of its model that may."""

    model: str = ""
    stages: tuple[str, ...] = ()
    """Names of their deployments."""
    starts_asleep: bool = False
    """Not loaded before it is asked."""


NOT_TOGETHER = Sleeping()


def plan_serve_options(
    resources: ResourceConfig,
    *,
    graceful_shutdown_timeout_s: float,
    num_shards: int = 1,
    reports_load: bool = False,
    has_sessions: bool = False,
    preload: list[str] | None = None,
    sleeping: Sleeping = NOT_TOGETHER,
) -> dict[str, Any]:
    """Keyword arguments of `Deployment.options` for one stage.

    With several shards the replica itself is rank 0 and lies in bundle 0 of its placement group; ranks 1 to
    num_shards - 1 are child actors in the bundles after it, each of the same size, on one node if they fit.

    Args:
        graceful_shutdown_timeout_s: how long a replica that is no longer wanted may work on its last requests.
        reports_load: whether the replicas say how busy they are (autoscaling.py), or Serve counts requests.
        has_sessions: whether calls of one `session_id` are to meet in one replica, while it has room.
        preload: what a fork server imports for them (preload.py).
        sleeping: of a stage that may have no replica (sleeping.py).
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": resources.max_ongoing_requests,
        "graceful_shutdown_timeout_s": graceful_shutdown_timeout_s,
        **HEALTH_CHECKS,
        "ray_actor_options": {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "runtime_env": stage_environment(resources) | ({PRELOAD_FIELD: preload} if preload else {}),
        },
        **_plan_replicas(resources, reports_load, sleeping),
    }
    if has_sessions and resources.max_replicas > 1:
        options["request_router_config"] = {"request_router_class": SESSION_ROUTER}
    if num_shards == 1 and resources.label_selector:
        options["ray_actor_options"]["label_selector"] = resources.label_selector
    if num_shards > 1:
        bundle = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
        options["placement_group_bundles"] = [
            {name: amount for name, amount in bundle.items() if amount} for _ in range(num_shards)
        ]
        options["placement_group_strategy"] = "PACK"
        if resources.label_selector:
            options["placement_group_bundle_label_selector"] = [resources.label_selector] * num_shards
    return options


def stage_environment(resources: ResourceConfig) -> dict[str, Any]:
    """Ray's `runtime_env` of a stage's process."""
    return {"env_vars": STAGE_ENV | (GPU_ENV if resources.num_gpus else NO_GPU_ENV)}


def _plan_replicas(resources: ResourceConfig, reports_load: bool, sleeping: Sleeping) -> dict[str, Any]:
    if resources.min_replicas == resources.max_replicas:
        return {"num_replicas": resources.min_replicas}
    autoscaling: dict[str, Any] = {
        "min_replicas": resources.min_replicas,
        "initial_replicas": max(1, resources.min_replicas),
        "max_replicas": resources.max_replicas,
        "target_ongoing_requests": resources.target_load,
        "upscale_delay_s": resources.upscale_delay_s,
        "downscale_delay_s": resources.downscale_delay_s,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
    }
    if not resources.min_replicas:
        autoscaling |= _plan_sleep(resources, reports_load, sleeping)
    elif reports_load:
        autoscaling["policy"] = {"policy_function": "cluster.autoscaling:load_policy"}
    return {"num_replicas": "auto", "autoscaling_config": autoscaling}


def _plan_sleep(resources: ResourceConfig, reports_load: bool, sleeping: Sleeping) -> dict[str, Any]:
    """The policy keeps the delays, for it alone knows when a stage must go before its time."""
    taken = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    return {
        "initial_replicas": 0 if sleeping.starts_asleep else 1,
        "downscale_delay_s": 0.0,
        "look_back_period_s": SLEEPER_LOOK_BACK_S,
        "policy": {
            "policy_function": "cluster.sleeping:SleepPolicy",
            "policy_kwargs": {
                "model": sleeping.model,
                "stages": list(sleeping.stages),
                "resources": [name for name, amount in taken.items() if amount],
                "reports_load": reports_load,
                "downscale_delay_s": resources.downscale_delay_s,
            },
        },
    }

"""Resources of a stage as Ray Serve deployment options. Pure: imports no Ray, so it plans anywhere."""

from typing import Any

from cluster.resources import ResourceConfig

STAGE_ENV = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # Ray warns that tensors received so are read-only views; no stage writes to what it is given.
    "PYTHONWARNINGS": "ignore::UserWarning:ray._private.tensor_serialization_utils,"
    "ignore::UserWarning:ray.cloudpickle.cloudpickle",
}
"""Set per stage, never job-wide: the first makes a process import torch, which the ingress must not
(measured: a 100 MB hand-off 350 -> 32 ms; ingress 316 -> 138 MB without it)."""


def plan_serve_options(
    resources: ResourceConfig, *, graceful_shutdown_timeout_s: float, num_shards: int = 1
) -> dict[str, Any]:
    """Keyword arguments of `Deployment.options` for one stage.

    With several shards the replica itself is rank 0 and lies in bundle 0 of its placement group; ranks 1 to
    num_shards - 1 are child actors in the bundles after it, each of the same size.
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": resources.max_ongoing_requests,
        "graceful_shutdown_timeout_s": graceful_shutdown_timeout_s,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "runtime_env": {"env_vars": dict(STAGE_ENV)},
        },
        **_plan_replicas(resources),
    }
    if num_shards > 1:
        bundle = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
        options["placement_group_bundles"] = [
            {name: amount for name, amount in bundle.items() if amount} for _ in range(num_shards)
        ]
        options["placement_group_strategy"] = "PACK"
    return options


def _plan_replicas(resources: ResourceConfig) -> dict[str, Any]:
    if resources.min_replicas == resources.max_replicas:
        return {"num_replicas": resources.min_replicas}
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": resources.min_replicas,
            "initial_replicas": max(1, resources.min_replicas),
            "max_replicas": resources.max_replicas,
            "target_ongoing_requests": resources.target_ongoing_requests,
            "upscale_delay_s": resources.upscale_delay_s,
            "downscale_delay_s": resources.downscale_delay_s,
        },
    }

"""Resources of a stage as Serve options; the last test asks Serve itself whether it takes them."""

from typing import Any

import pytest
from ray import serve
from ray._raylet import RAY_NODE_ACCELERATOR_TYPE_KEY
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from cluster.autoscaling import load_policy
from cluster.preload import PreloadPlugin
from cluster.resources import ACCELERATOR_LABEL, ResourceConfig
from cluster.serve_options import GPU_ENV, STAGE_ENV, plan_serve_options
from cluster.session_router import SessionRouter


def plan(
    num_shards: int = 1, *, reports_load: bool = False, has_sessions: bool = False, **resources: Any
) -> dict[str, Any]:
    return plan_serve_options(
        ResourceConfig(**resources),
        graceful_shutdown_timeout_s=90.0,
        num_shards=num_shards,
        reports_load=reports_load,
        has_sessions=has_sessions,
    )


def test_a_replica_reserves_what_the_config_says() -> None:
    options = plan(num_cpus=2.5, num_gpus=0.25, max_ongoing_requests=7)
    assert options["ray_actor_options"]["num_cpus"] == 2.5
    assert options["ray_actor_options"]["num_gpus"] == 0.25
    assert options["max_ongoing_requests"] == 7


def test_a_redeploy_lets_running_requests_end() -> None:
    assert plan()["graceful_shutdown_timeout_s"] == 90.0


def test_a_fixed_number_of_replicas_does_not_autoscale() -> None:
    options = plan(min_replicas=3, max_replicas=3)
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options


def test_a_range_of_replicas_autoscales_by_the_configured_targets() -> None:
    options = plan(min_replicas=1, max_replicas=4, target_load=1.5, upscale_delay_s=2, downscale_delay_s=60)
    assert options["num_replicas"] == "auto"
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 1, 4)
    assert config.target_ongoing_requests == 1.5
    assert (config.upscale_delay_s, config.downscale_delay_s) == (2, 60)


def test_requests_are_counted_unless_the_replicas_report_their_load() -> None:
    counted = AutoscalingConfig(**plan(max_replicas=2)["autoscaling_config"])
    reported = AutoscalingConfig(**plan(max_replicas=2, reports_load=True)["autoscaling_config"])
    assert counted.policy.is_default_policy_function()
    assert reported.policy.get_policy().__qualname__ == load_policy.__qualname__


def test_calls_of_one_session_go_to_one_replica_where_that_is_asked_for() -> None:
    assert "request_router_config" not in plan(max_replicas=2)
    assert "request_router_config" not in plan(has_sessions=True)  # one is always the same
    router = RequestRouterConfig(**plan(has_sessions=True, max_replicas=2)["request_router_config"])
    assert router.get_request_router_class().__name__ == SessionRouter.__name__


def test_a_burst_is_noticed_within_seconds() -> None:
    config = AutoscalingConfig(**plan(max_replicas=2)["autoscaling_config"])
    assert config.metrics_interval_s + config.look_back_period_s + config.upscale_delay_s < 15


def test_a_stage_that_may_sleep_is_awake_at_first() -> None:
    autoscaling = plan(min_replicas=0, max_replicas=2)["autoscaling_config"]
    assert (autoscaling["min_replicas"], autoscaling["initial_replicas"]) == (0, 1)


def test_one_shard_needs_no_placement_group() -> None:
    assert "placement_group_bundles" not in plan(num_gpus=1)


def test_every_shard_gets_a_bundle_of_its_own() -> None:
    options = plan(num_shards=3, num_cpus=2, num_gpus=0.5)
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 0.5}] * 3
    assert options["placement_group_strategy"] == "PACK"


def test_a_bundle_names_only_what_it_holds() -> None:
    """Ray refuses a bundle with a zero in it."""
    assert plan(num_shards=2, num_cpus=1, num_gpus=0)["placement_group_bundles"] == [{"CPU": 1}] * 2


def test_ray_labels_nodes_by_their_accelerator() -> None:
    assert ACCELERATOR_LABEL == RAY_NODE_ACCELERATOR_TYPE_KEY


def test_a_stage_may_be_bound_to_an_accelerator_and_to_labels() -> None:
    where = {"ray.io/accelerator-type": "H100", "zone": "a"}
    resources: dict[str, Any] = {"accelerator_type": "H100", "labels": {"zone": "a"}, "num_gpus": 1}
    assert plan(**resources)["ray_actor_options"]["label_selector"] == where
    assert plan(num_shards=3, **resources)["placement_group_bundle_label_selector"] == [where] * 3


def test_tensors_travel_without_a_copy_in_an_environment_that_no_two_stages_share() -> None:
    one, other = (plan(num_gpus=0.5)["ray_actor_options"]["runtime_env"]["env_vars"] for _ in range(2))
    assert one["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] == "1"
    one.clear()
    assert other == STAGE_ENV | GPU_ENV


def test_who_asks_for_no_gpu_sees_none() -> None:
    assert plan()["ray_actor_options"]["runtime_env"]["env_vars"] == STAGE_ENV | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    "options",
    [
        plan(),
        plan(min_replicas=0, max_replicas=2),
        plan(num_shards=2, num_gpus=0.5),
        plan(num_shards=2, num_gpus=1, max_replicas=3, reports_load=True, has_sessions=True),
        plan(num_gpus=1, accelerator_type="H100"),
        plan(num_shards=2, num_gpus=1, labels={"zone": "!b"}),
    ],
)
def test_serve_takes_the_options(options: dict[str, Any]) -> None:
    class Stage:
        pass

    deployment = serve.deployment(Stage).options(**options)
    assert deployment.ray_actor_options["num_cpus"] == options["ray_actor_options"]["num_cpus"]


def test_what_is_to_be_preloaded_is_a_field_of_rays_own_environment() -> None:
    options = plan_serve_options(
        ResourceConfig(), graceful_shutdown_timeout_s=1.0, preload=["module:function", "it"]
    )
    environment = RuntimeEnv(**options["ray_actor_options"]["runtime_env"])
    assert dict(environment.plugins()) == {PreloadPlugin.name: ["module:function", "it"]}

"""Tests of a stage's Serve options; the last test checks that Serve accepts them."""

from typing import Any

import pytest
from ray import serve
from ray._raylet import RAY_NODE_ACCELERATOR_TYPE_KEY
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from cluster.preload import PreloadPlugin
from cluster.replicas.least_loaded_router import LeastLoadedRouter
from cluster.replicas.resources import ACCELERATOR_LABEL, AUTO_REPLICAS, ResourceConfig
from cluster.replicas.serve_options import GPU_ENV, STAGE_ENV, ScalingHints, plan_serve_options
from cluster.replicas.session_router import SessionRouter
from cluster.scaling.autoscaling import GrowPolicy
from deployments.config.vae import VaeConfig


def plan(
    num_shards: int = 1, *, reports_load: bool = False, has_sessions: bool = False, **resources: Any
) -> dict[str, Any]:
    return plan_serve_options(
        ResourceConfig(**resources),
        graceful_shutdown_timeout_s=90.0,
        num_shards=num_shards,
        hints=ScalingHints(reports_load=reports_load),
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
    assert (config.upscale_delay_s, config.policy.policy_kwargs["downscale_delay_s"]) == (2, 60)


def test_one_policy_decides_and_keeps_the_delay_before_a_stage_shrinks() -> None:
    """Only the policy knows when a replica must end before its delay has passed."""
    config = AutoscalingConfig(**plan(max_replicas=2)["autoscaling_config"])
    assert config.policy.get_policy().__qualname__ == GrowPolicy.__qualname__
    assert config.downscale_delay_s == 0


def test_a_stage_with_gpus_has_what_the_cluster_holds_unless_a_number_is_said() -> None:
    config = AutoscalingConfig(**plan(num_gpus=0.5)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, AUTO_REPLICAS)
    assert config.policy.policy_kwargs["is_auto"]
    assert plan(num_gpus=0.5, max_replicas=1)["num_replicas"] == 1
    assert plan()["num_replicas"] == 1
    assert AutoscalingConfig(**plan(max_replicas="auto")["autoscaling_config"]).max_replicas == AUTO_REPLICAS


def test_weights_that_come_and_go_are_not_copied_unasked() -> None:
    streamed = VaeConfig(num_gpus=0.5, time_sharing=True)
    assert (streamed.most_replicas, VaeConfig(num_gpus=0.5).is_auto) == (1, True)


def test_of_several_replicas_one_is_chosen_by_its_session_or_its_load() -> None:
    assert "request_router_config" not in plan(has_sessions=True)  # a single replica needs no router
    for has_sessions, expected in ((False, LeastLoadedRouter), (True, SessionRouter)):
        router = RequestRouterConfig(**plan(has_sessions=has_sessions, max_replicas=2)["request_router_config"])
        assert router.get_request_router_class().__name__ == expected.__name__


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
    """Ray refuses a bundle with an amount of zero."""
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
        plan(min_replicas=0, max_replicas="auto", num_gpus=1),
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

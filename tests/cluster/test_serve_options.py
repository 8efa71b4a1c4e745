"""Resources become Serve's options."""

from cluster.resources import ResourceConfig
from cluster.serve_options import plan_serve_options


def plan(**resources: float) -> dict[str, object]:
    num_shards = int(resources.pop("num_shards", 1))
    config = ResourceConfig(**resources)
    return plan_serve_options(config, graceful_shutdown_timeout_s=60, num_shards=num_shards)


def test_one_replica_is_a_fixed_number() -> None:
    options = plan(min_replicas=2, max_replicas=2)
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options


def test_different_bounds_autoscale_between_them() -> None:
    options = plan(min_replicas=0, max_replicas=4, target_ongoing_requests=3)
    assert options["num_replicas"] == "auto"
    autoscaling = options["autoscaling_config"]
    assert isinstance(autoscaling, dict)
    assert (autoscaling["min_replicas"], autoscaling["max_replicas"]) == (0, 4)
    assert autoscaling["target_ongoing_requests"] == 3


def test_each_shard_gets_a_bundle_of_its_own() -> None:
    options = plan(num_cpus=2, num_gpus=0.5, num_shards=3)
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 0.5}] * 3


def test_one_shard_needs_no_placement_group() -> None:
    assert "placement_group_bundles" not in plan(num_gpus=1)


def test_a_redeploy_lets_running_requests_end() -> None:
    assert plan()["graceful_shutdown_timeout_s"] == 60


def test_only_stages_import_torch_by_themselves() -> None:
    actor = plan()["ray_actor_options"]
    assert isinstance(actor, dict)
    assert actor["runtime_env"]["env_vars"]["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] == "1"

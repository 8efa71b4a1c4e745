"""What the policy makes of what Serve tells it; tests/serve_app/test_nodes.py lets Serve tell it."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.autoscaling import load_policy


def decide(
    loads: list[float],
    *,
    running: float,
    queued: float = 0,
    target_load: float = 1.0,
    num_replicas: int | None = None,
    num_wanted: int | None = None,
) -> float:
    """num_replicas: that run, if not those that tell their loads; num_wanted: so far, if not those that run."""
    num_replicas = len(loads) if num_replicas is None else num_replicas
    metrics: Any = {"load": dict(enumerate(loads))} if loads else {}
    unused: Any = None
    context = AutoscalingContext(
        deployment_id=unused,
        deployment_name="Transformer",
        app_name="relay",
        current_num_replicas=num_replicas,
        target_num_replicas=num_replicas if num_wanted is None else num_wanted,
        running_replicas=[],
        total_num_requests=running + queued,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=target_load),
    )
    return load_policy(context)[0]


def test_every_replica_is_to_have_its_target_load() -> None:
    assert decide([1.5, 2.5], running=16) == 4.0
    assert decide([1.5, 2.5], running=16, target_load=2.0) == 2.0


def test_small_pictures_need_fewer_replicas_than_as_many_large_ones() -> None:
    small, large = decide([16 / 8], running=16), decide([16.0], running=16)
    assert (small, large) == (2.0, 16.0)


def test_requests_that_no_replica_has_yet_weigh_as_much_as_those_that_one_has() -> None:
    assert decide([2.0, 2.0], running=8, queued=4) == pytest.approx(6.0)


def test_an_idle_stage_may_sleep() -> None:
    assert decide([0.0], running=0) == 0.0


def test_a_stage_whose_requests_are_still_being_encoded_may_not() -> None:
    assert decide([0.0], running=0, queued=3) == 1.0


def test_a_replica_that_has_not_reported_yet_keeps_its_stage_awake() -> None:
    assert decide([], running=2, num_replicas=1) == 1.0


def test_replicas_that_still_load_stay_wanted() -> None:
    assert decide([], running=0, num_wanted=1) == 1.0
    assert decide([], running=0, queued=4, num_wanted=3) == 3.0


def test_a_stage_asleep_is_woken_by_a_request_and_by_nothing_else() -> None:
    assert decide([], running=0, queued=1) == 1.0
    assert decide([], running=0) == 0.0

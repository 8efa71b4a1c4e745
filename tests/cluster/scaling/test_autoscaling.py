"""Tests the policy's decisions for given reports; in tests/serve_app/bench/test_nodes.py the reports come from
Serve."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.scaling.autoscaling import COLD_START_S, LEFT_S, LOAD, REQUEST_S, GrowPolicy

FRESH_S = 10.0
"""Seconds that requests with a load of 1 take from their start."""


def decide(
    loads: list[float],
    *,
    running: float,
    queued: float = 0,
    target_load: float = 1.0,
    num_replicas: int | None = None,
    num_wanted: int | None = None,
    cold_start_s: float = 0.0,
    left: float = 1.0,
) -> float:
    """num_replicas: running replicas, by default those that report loads; num_wanted: the target so far, by
    default the running replicas; left: share of the requests' work that is not done yet."""
    num_replicas = len(loads) if num_replicas is None else num_replicas
    metrics: Any = {}
    if loads:
        request_s = FRESH_S * sum(loads) / running if running else FRESH_S
        told = {LOAD: loads, LEFT_S: [load * FRESH_S * left for load in loads]}
        told |= {COLD_START_S: [cold_start_s] * len(loads), REQUEST_S: [request_s] * len(loads)}
        metrics = {name: dict(enumerate(values)) for name, values in told.items()}
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
        capacity_adjusted_max_replicas=32,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=target_load),
    )
    policy = GrowPolicy({"GPU": 1.0}, 1, {}, [], FRESH_S, is_auto=False, reports_load=True, downscale_delay_s=0)
    return policy(context)[0]


def test_every_replica_is_to_have_its_target_load() -> None:
    assert decide([2.0, 2.0], running=16, num_wanted=9) == 4.0
    assert decide([2.0, 2.0], running=16, num_wanted=9, target_load=2.0) == 2.0


def test_more_are_wanted_for_the_work_that_is_left_when_they_could_serve() -> None:
    """One replica has eight requests, each of which fills a replica: 80 s of work. A new one would find part of
    it, or none."""
    wanted = [decide([8.0], running=8, cold_start_s=seconds) for seconds in (0, 30, 90)]
    assert wanted == [8.0, 4.0, 1.0]


def test_requests_that_are_nearly_done_ask_for_no_more() -> None:
    assert decide([8.0], running=8, cold_start_s=10, left=0.1) == 1.0


def test_no_stage_shrinks_because_its_queue_will_drain() -> None:
    assert decide([8.0], running=8, num_wanted=3, cold_start_s=90) == 3.0


def test_small_pictures_need_fewer_replicas_than_as_many_large_ones() -> None:
    small, large = (decide(loads, running=16, num_wanted=20) for loads in ([16 / 8], [16.0]))
    assert (small, large) == (2.0, 16.0)


def test_requests_that_no_replica_has_yet_weigh_as_much_as_those_that_one_has() -> None:
    assert decide([2.0, 2.0], running=8, queued=4, num_wanted=9) == pytest.approx(6.0)


def test_an_idle_stage_may_sleep() -> None:
    assert decide([0.0], running=0) == 0.0


def test_a_stage_whose_requests_are_still_being_encoded_may_not() -> None:
    assert decide([0.0], running=0, queued=1) == 1.0


def test_what_is_on_the_way_counts_as_work_before_a_replica_has_it() -> None:
    assert decide([0.0], running=0, queued=3) == 3.0
    assert decide([0.0], running=0, queued=3, cold_start_s=60) == 1.0


def test_a_replica_that_has_not_reported_yet_keeps_its_stage_awake() -> None:
    assert decide([], running=2, num_replicas=1) == 1.0


def test_replicas_that_still_load_stay_wanted() -> None:
    assert decide([], running=0, num_wanted=1) == 1.0
    assert decide([], running=0, queued=4, num_wanted=3) == 3.0


def test_a_stage_asleep_is_woken_by_a_request_and_by_nothing_else() -> None:
    assert decide([], running=0, queued=1) == 1.0
    assert decide([], running=0) == 0.0

"""Tests that the simulated cluster agrees with queueing theory and does nothing that is impossible."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cluster.replicas.resources import ResourceConfig
from serve_app.bench import simulate
from serve_app.bench.queueing import Scaling, Stage, StageDay, Times, simulate_stage

DAY_S = 20_000
SCALING = simulate.plan_scaling(ResourceConfig())


def poisson(rate: float, *, seed: int = 0, day_s: int = DAY_S) -> Times:
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, day_s, rng.poisson(rate * day_s)))


def run(arrivals: Times, stage: Stage, scaling: Scaling = SCALING, *, day_s: int = DAY_S) -> StageDay:
    return simulate_stage(arrivals, stage, scaling, day_s=day_s)


def fixed(num_replicas: int, **options: float | int) -> Stage:
    return Stage("stage", 1.0, min_replicas=num_replicas, max_replicas=num_replicas, **options)  # type: ignore[arg-type]


def in_system(arrivals: Times, departures: Times, at: Times) -> Times:
    return np.searchsorted(arrivals, at) - np.searchsorted(departures, at).astype(float)


@pytest.mark.parametrize("use", [0.3, 0.6, 0.8])
def test_one_replica_waits_as_an_m_d_1_queue_does(use: float) -> None:
    """Pollaczek-Khinchine formula: the mean wait is use / (2 (1 - use)) service times."""
    arrivals = poisson(use, day_s=200_000)
    waits = run(arrivals, fixed(1), day_s=200_000).departures - arrivals - 1.0
    assert waits.mean() == pytest.approx(use / (2 * (1 - use)), rel=0.05)


def test_a_replica_with_many_idle_neighbours_never_waits() -> None:
    arrivals = poisson(2.0)
    assert np.allclose(run(arrivals, fixed(40)).departures - arrivals, 1.0)


def test_an_overloaded_replica_serves_one_after_another() -> None:
    assert run(np.zeros(5), fixed(1)).departures.tolist() == [1, 2, 3, 4, 5]


def test_littles_law_holds() -> None:
    arrivals = poisson(3.5)
    departures = run(arrivals, fixed(4)).departures
    moments = np.arange(0.5, DAY_S)
    mean = in_system(arrivals, departures, moments).mean()
    assert mean == pytest.approx(3.5 * (departures - arrivals).mean(), rel=0.02)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_no_request_is_lost_cut_or_served_by_a_gpu_that_nobody_holds(num_shards: int) -> None:
    """Also while replicas come and go, there are never more busy GPUs than held ones."""
    rates = [1, 9, 2, 11, 1]
    arrivals = np.concatenate([poisson(rate, day_s=2000) + 2000 * i for i, rate in enumerate(rates)])
    stage = Stage("stage", 8.0, num_shards=num_shards, min_replicas=1, max_replicas=100)
    day = run(arrivals, stage)
    assert len(day.departures) == len(arrivals)
    assert np.all(day.departures >= arrivals + 8.0 - 1e-9)
    seconds = np.arange(1, DAY_S + 1)
    busy = np.searchsorted(day.departures - 8.0, seconds) - np.searchsorted(day.departures, seconds)
    assert np.all(busy <= day.held_gpus)
    assert len(set(day.held_gpus)) > 5  # replicas did come and go
    assert set(day.held_gpus % num_shards) == {0}
    assert day.busy_gpu_s == pytest.approx(8.0 * len(arrivals))
    assert day.busy_gpu_s < day.held_gpu_s
    assert day.held_gpu_s == pytest.approx(day.held_gpus.sum(), rel=0.01)


@pytest.mark.parametrize("num_replicas", [1, 7])
def test_fixed_replicas_are_what_autoscaling_is_that_never_scales(num_replicas: int) -> None:
    """Fixed replicas are computed by a formula, autoscaled ones slot by slot."""
    arrivals = poisson(0.9 * num_replicas)
    elastic = replace(fixed(num_replicas), max_replicas=num_replicas + 1)
    never = replace(SCALING, upscale_delay_s=math.inf, downscale_delay_s=math.inf)
    one, other = run(arrivals, fixed(num_replicas)), run(arrivals, elastic, never)
    assert np.allclose(one.departures, other.departures)
    assert one.held_gpu_s == pytest.approx(other.held_gpu_s)
    assert np.array_equal(one.held_gpus, other.held_gpus)


def test_fixed_replicas_are_held_all_day() -> None:
    day = run(poisson(2.0), fixed(6))
    assert day.held_gpu_s == pytest.approx(6 * DAY_S, rel=1e-3)
    assert set(day.held_gpus) == {6}


def test_autoscaling_settles_at_the_load_over_its_target() -> None:
    arrivals = np.arange(0.05, 4000, 0.1)  # 10 requests per second of 1 s each: a load of 10
    stage = Stage("stage", 1.0, min_replicas=1, max_replicas=100)
    day = run(arrivals, stage, replace(SCALING, target_load=0.8), day_s=4000)
    assert day.held_gpus[-1] == math.ceil(10 / 0.8)
    assert (day.departures - arrivals)[-100:].max() == pytest.approx(1.0)


def test_a_stage_without_requests_falls_to_its_fewest_replicas_when_the_delay_is_over() -> None:
    arrivals = np.arange(0, 1000, 0.1)
    stage = Stage("stage", 1.0, min_replicas=2, max_replicas=50)
    held = run(arrivals, stage, day_s=2000).held_gpus
    assert held[1000 + round(SCALING.downscale_delay_s) - 1] > 2
    assert held[-1] == 2


def test_a_new_replica_holds_its_gpu_while_it_loads_and_serves_afterwards() -> None:
    arrivals = np.zeros(40)
    stage = Stage("stage", 100.0, min_replicas=1, max_replicas=2)
    day = run(arrivals, stage, day_s=1000)
    new = day.departures[1] - 100.0
    assert new == SCALING.upscale_delay_s + SCALING.cold_start_s + 1
    assert day.held_gpus[round(SCALING.upscale_delay_s) + 1] == 2


def test_plan_gives_every_gpu_to_the_stage_that_is_slowest() -> None:
    planned = simulate.plan_replicas(simulate.STAGES, 512)
    assert sum(stage.max_replicas for stage in planned) == 512
    bound = simulate.bound_per_s(planned)
    for giver in planned:
        for taker in planned:
            moved = [
                replace(stage, max_replicas=stage.max_replicas + (stage == taker) - (stage == giver))
                for stage in planned
            ]
            assert simulate.bound_per_s(moved) <= bound or giver == taker


def test_arrivals_follow_the_day_and_never_exceed_the_cluster() -> None:
    arrivals = simulate.draw_arrivals(np.random.default_rng(1), 10.0)
    per_hour = np.histogram(arrivals, 24, (0, 86_400))[0] / 3600
    assert np.argmin(per_hour) in (6, 7, 8, 9)
    assert per_hour[20] == pytest.approx(8.0, rel=0.2)
    assert per_hour.max() < 10.0
    assert all(one <= other for one, other in pairwise(arrivals))


def test_the_same_seed_gives_the_same_day() -> None:
    one, other, another = (simulate.draw_arrivals(np.random.default_rng(seed), 1.0) for seed in (3, 3, 4))
    assert np.array_equal(one, other)
    assert not np.array_equal(one[:100], another[:100])


def test_a_day_gets_a_row_per_placement_and_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "day.svg"
    simulate.run(num_gpus=(8, 16), seed=0, target_load=None, json_file=tmp_path / "day.json", svg_file=file)
    texts = {text.text for text in ElementTree.parse(file).findall(".//{*}text")}
    assert {"fixed", "autoscaled", "8", "16"} <= texts

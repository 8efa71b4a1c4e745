"""Simulates a day of a large cluster, with fixed replicas and autoscaled: GPU use and latency of requests.

The simulation uses published stage times; nothing here was measured on that many GPUs. Assumptions:

- Qwen-Image-2512, 50 steps, one H100 per replica: 0.26 s to encode, 25.3 s to denoise, 0.31 s to decode (blog post
  of LightX2V on disaggregation). All requests are alike; nothing is batched, cached, or lost between the stages.
- Requests arrive as a Poisson process. The rate is a wave from 20 % of its peak at 8 h to the peak at 20 h; in six
  bursts of ten minutes it is 1.5 times as high, up to what the whole cluster can do.
- The wave's peak is 80 % of what all GPUs can do; a stage's replicas are in proportion to its time.
- A new replica serves after 85 s (readiness of a whole pipeline as vLLM-Omni reports it, PR #5885).
- Autoscaling uses this project's defaults, from 1 replica up to the number in the fixed placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import track

from cluster.replicas.resources import ResourceConfig
from cluster.replicas.serve_options import LOOK_BACK_S
from cluster.scaling.balance import balance
from serve_app.bench.day_picture import draw_day
from serve_app.bench.queueing import Scaling, Stage, StageDay, Times, simulate_stage
from serve_app.bench.report import Row, report

DAY_S = 86_400
STAGES = (Stage("encode", 0.26), Stage("denoise", 25.3), Stage("decode", 0.31))
COLD_START_S = 85.0
PEAK_SHARE = 0.8
TROUGH_SHARE = 0.2
NUM_BURSTS, BURST_S, BURST_FACTOR = 6, 600, 1.5


@dataclass(frozen=True)
class Day:
    """The results of one placement under a day's requests."""

    latencies: Times
    """[N], seconds from arrival to the finished image."""
    stages: tuple[StageDay, ...]

    @property
    def held_gpus(self) -> npt.NDArray[np.int64]:
        """[T], GPUs that all stages hold, at the end of every second."""
        total: npt.NDArray[np.int64] = np.stack([stage.held_gpus for stage in self.stages]).sum(axis=0)
        return total

    @property
    def gpu_hours(self) -> float:
        return sum(stage.held_gpu_s for stage in self.stages) / 3600

    @property
    def use(self) -> float:
        """Share of the held GPU time in which a GPU works on a request."""
        return sum(stage.busy_gpu_s for stage in self.stages) / 3600 / self.gpu_hours


def run(
    *,
    num_gpus: Sequence[int],
    seed: int,
    target_load: float | None,
    json_file: Path | None,
    svg_file: Path | None,
) -> None:
    """Reports rows of `gpus`, `placement`, `requests`, `gpu_hours`, `use`, `p50_s`, `p95_s` and `p99_s`.

    The placements: fixed replicas on all GPUs; autoscaled; autoscaled by the average load of the last seconds; and
    fixed replicas on as many GPUs as autoscaling holds on average.
    """
    scaling = plan_scaling(ResourceConfig() if target_load is None else ResourceConfig(target_load=target_load))
    rows: list[Row] = []
    days: dict[str, Day] = {}
    for gpus in track(num_gpus, description="days"):
        fixed = plan_replicas(STAGES, gpus)
        arrivals = draw_arrivals(np.random.default_rng(seed), bound_per_s(fixed))
        elastic = [replace(stage, min_replicas=1) for stage in fixed]
        days = {
            "fixed": simulate(arrivals, fixed, scaling),
            "autoscaled": simulate(arrivals, elastic, scaling),
            "by averages": simulate(arrivals, elastic, replace(scaling, forecasts=False)),
        }
        fewer = plan_replicas(STAGES, round(days["autoscaled"].gpu_hours / 24))
        days["fixed, as many GPU hours"] = simulate(arrivals, fewer, scaling)
        rows += [_row(gpus, placement, day) for placement, day in days.items()]
    report("a simulated day", rows, json_file)
    if svg_file is not None:
        svg_file.write_text(draw_day(rows, {name: day.held_gpus for name, day in days.items()}))


def plan_scaling(resources: ResourceConfig) -> Scaling:
    """Returns the scaling that the cluster would apply to a stage with this config."""
    return Scaling(
        target_load=resources.target_load,
        upscale_delay_s=resources.upscale_delay_s,
        downscale_delay_s=resources.downscale_delay_s,
        look_back_s=round(LOOK_BACK_S),
        cold_start_s=COLD_START_S,
    )


def plan_replicas(stages: Sequence[Stage], num_gpus: int) -> list[Stage]:
    """Returns the stages with fixed replica counts that fit num_gpus.

    They have the highest bound on throughput, min(replicas / time).
    """
    used = sum(stage.num_shards for stage in stages)

    def place(stage: Stage) -> bool:
        nonlocal used
        has_room = used + stage.num_shards <= num_gpus
        used += stage.num_shards * has_room
        return has_room

    request_s = {stage: stage.service_s / stage.num_shards for stage in stages}
    found = balance(dict.fromkeys(stages, 1), request_s, dict.fromkeys(stages, num_gpus), place)
    return [replace(stage, min_replicas=number, max_replicas=number) for stage, number in found.items()]


def bound_per_s(stages: Sequence[Stage]) -> float:
    """Returns the requests per second that all replicas together can do."""
    return min(stage.max_replicas * stage.num_shards / stage.service_s for stage in stages)


def draw_arrivals(rng: np.random.Generator, bound: float, *, day_s: int = DAY_S) -> Times:
    """Returns arrival times, [N], rising: a Poisson process of `bound` per second, thinned to the day's rate."""
    starts = rng.uniform(0, day_s - BURST_S, NUM_BURSTS)

    def rate(times: Times) -> Times:
        wave = (1 + np.cos(2 * np.pi * (times / day_s - 20 / 24))) / 2
        base = PEAK_SHARE * bound * (TROUGH_SHARE + (1 - TROUGH_SHARE) * wave)
        in_burst = np.any([(start <= times) & (times < start + BURST_S) for start in starts], axis=0)
        return np.minimum(np.where(in_burst, BURST_FACTOR * base, base), bound)

    times = np.sort(rng.uniform(0, day_s, rng.poisson(bound * day_s)))
    return times[rng.uniform(0, bound, len(times)) < rate(times)]


def simulate(arrivals: Times, stages: Sequence[Stage], scaling: Scaling, *, day_s: int = DAY_S) -> Day:
    """Simulates the stages in sequence: a request that leaves one arrives at the next."""
    now, days = arrivals, []
    for stage in stages:
        days.append(simulate_stage(now, stage, scaling, day_s=day_s))
        now = days[-1].departures
    return Day(now - arrivals, tuple(days))


def _row(gpus: int, placement: str, day: Day) -> Row:
    p50, p95, p99 = (float(value) for value in np.percentile(day.latencies, (50, 95, 99)))
    return {
        "gpus": gpus,
        "placement": placement,
        "requests": len(day.latencies),
        "gpu_hours": day.gpu_hours,
        "use": day.use,
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
    }

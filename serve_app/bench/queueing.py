"""Simulates one stage, a queue in front of autoscaled replicas: latency of requests, and GPUs held.

Requests are served in order of arrival, by the slot that is free first. Times are in seconds since the day began.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.scaling.load_forecast import Backlog, LoadForecast

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """A stage's replicas: time per request, GPUs, and limits on their number."""

    name: str
    service_s: float
    """GPU time of one request, summed over all shards."""
    num_shards: int = 1
    """GPUs of a replica, and also the number of requests that it runs at once, each of which takes service_s."""
    min_replicas: int = 1
    """At least 1: scaling to zero is not simulated."""
    max_replicas: int = 1


@dataclass(frozen=True)
class Scaling:
    """The stages' autoscaling settings, and the time until a new replica serves."""

    target_load: float
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_s: int
    cold_start_s: float
    forecasts: bool = True
    """Whether to scale by the work that will be left once a new replica could serve; False: by the average load of
    the last look_back_s seconds alone."""


@dataclass(frozen=True)
class StageDay:
    """The results of a day's requests at one stage."""

    departures: Times
    """[N], in order of arrival."""
    busy_gpu_s: float
    held_gpu_s: float
    held_gpus: npt.NDArray[np.int64]
    """[T], GPUs of replicas that are loading, serving or draining, at the end of every second."""


def simulate_stage(arrivals: Times, stage: Stage, scaling: Scaling, *, day_s: int) -> StageDay:
    """Simulates one stage. Requests of the last minutes are served after the day's end. arrivals: [N], rising."""
    if stage.min_replicas == stage.max_replicas:
        return _simulate_fixed(arrivals, stage, day_s=day_s)
    pool = Pool(stage)
    scaler = Scaler(stage, scaling)
    times = arrivals.tolist()
    departures: list[float] = []
    arrived = np.searchsorted(arrivals, np.arange(1, day_s + 1)).tolist()
    held, num_departed, num_begun, begun_s = [], 0, 0, 0.0
    for second in range(1, day_s + 1):
        pool.serve(times, departures, until=float(second))
        begun_s += sum(departures[num_begun:])
        num_begun = len(departures)
        while num_departed < num_begun and departures[num_departed] <= second:
            begun_s -= departures[num_departed]
            num_departed += 1  # in order, since all requests take equally long
        num_present, num_busy = arrived[second - 1] - num_departed, num_begun - num_departed
        work_s = begun_s - second * num_busy + stage.service_s * (num_present - num_busy)
        backlog = Backlog(num_present / stage.num_shards, work_s / stage.num_shards, stage.service_s)
        num_replicas = scaler.decide(backlog, pool.num_ready(float(second)), now=second)
        pool.resize(num_replicas, now=float(second), cold_start_s=scaling.cold_start_s)
        held.append(pool.num_held(float(second)))
    pool.serve(times, departures, until=math.inf)
    end_s = max([float(day_s), *departures[-1:]])
    held_gpus = np.array(held) * stage.num_shards
    return StageDay(
        np.array(departures),
        busy_gpu_s=len(times) * stage.service_s,
        held_gpu_s=pool.held_s(end_s) * stage.num_shards,
        held_gpus=held_gpus,
    )


def _simulate_fixed(arrivals: Times, stage: Stage, *, day_s: int) -> StageDay:
    """Simulates fixed replicas without stepping through time.

    All requests take equally long, so request i gets the slot that request i - num_slots leaves.
    """
    num_slots, service_s = stage.max_replicas * stage.num_shards, stage.service_s
    rounds = math.ceil(len(arrivals) / num_slots)
    padded = np.concatenate([arrivals, np.full(rounds * num_slots - len(arrivals), np.inf)])
    before = service_s * np.arange(rounds)[:, None]  # work of a never idle slot when a round begins
    starts = np.maximum.accumulate(padded.reshape(rounds, num_slots) - before, axis=0) + before
    departures = (starts + service_s).ravel()[: len(arrivals)]
    end_s = max([float(day_s), *departures[-1:].tolist()])
    return StageDay(
        departures,
        busy_gpu_s=len(arrivals) * service_s,
        held_gpu_s=num_slots * end_s,
        held_gpus=np.full(day_s, num_slots),
    )


class Pool:
    """The replicas. Each has as many slots as shards, and a slot serves one request at a time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._born: dict[int, float] = {}
        self._ready: dict[int, float] = {}
        self._slots: list[tuple[float, int]] = []  # a heap of (time when it is free, its replica)
        self._draining: list[float] = []  # time when each is done
        self._retired_s = 0.0
        self._num_born = 0
        self.resize(stage.min_replicas, now=0.0, cold_start_s=0.0)

    def serve(self, arrivals: Sequence[float], departures: list[float], *, until: float) -> None:
        """Begins all requests that can begin before `until`, in order."""
        slots, service_s = self._slots, self._stage.service_s
        while len(departures) < len(arrivals):
            free, replica = slots[0]
            start = max(arrivals[len(departures)], free)
            if start >= until:
                return
            departures.append(start + service_s)
            heapq.heapreplace(slots, (start + service_s, replica))

    def resize(self, num_replicas: int, *, now: float, cold_start_s: float) -> None:
        """Sets the number of replicas. Retired ones finish the requests they have begun; new ones load first."""
        for _ in range(num_replicas - len(self._born)):
            self._born[self._num_born], self._ready[self._num_born] = now, now + cold_start_s
            for _ in range(self._stage.num_shards):
                heapq.heappush(self._slots, (now + cold_start_s, self._num_born))
            self._num_born += 1
        if num_replicas < len(self._born):
            self._retire(len(self._born) - num_replicas, now)

    def num_ready(self, now: float) -> int:
        """Returns the number of replicas that serve and are not draining."""
        return sum(ready <= now for ready in self._ready.values())

    def num_held(self, now: float) -> int:
        """Returns the number of replicas that hold their GPUs, including draining ones."""
        self._draining = [done for done in self._draining if done > now]
        return len(self._born) + len(self._draining)

    def held_s(self, end_s: float) -> float:
        """Returns the seconds for which all replicas, past and present, have held their GPUs until end_s."""
        return self._retired_s + sum(end_s - born for born in self._born.values())

    def _retire(self, num_replicas: int, now: float) -> None:
        """Retires the replicas that are done with their requests first."""
        done: dict[int, float] = {}
        for free, replica in self._slots:
            done[replica] = max(done.get(replica, now), free)
        gone = set(sorted(done, key=done.__getitem__)[:num_replicas])
        for replica in gone:
            self._retired_s += done[replica] - self._born.pop(replica)
            del self._ready[replica]
            self._draining.append(done[replica])
        self._slots = [slot for slot in self._slots if slot[1] not in gone]
        heapq.heapify(self._slots)


class Scaler:
    """Decides the number of replicas in the way of the cluster's policy, including its delays."""

    def __init__(self, stage: Stage, scaling: Scaling) -> None:
        self._stage, self._scaling = stage, scaling
        self._target = stage.min_replicas
        self._forecast = LoadForecast()
        self._loads: deque[float] = deque(maxlen=scaling.look_back_s)
        self._since: int | None = None
        self._direction = 0

    def decide(self, backlog: Backlog, num_ready: int, *, now: int) -> int:
        """Returns the number of replicas that there should be at this second."""
        self._loads.append(backlog.load)
        load = sum(self._loads) / len(self._loads)
        if self._scaling.forecasts:
            most = self._target * self._scaling.target_load
            forecast = self._forecast.load(float(now), backlog, num_ready, self._scaling.cold_start_s)
            load = max(forecast, min(load, most))
        wanted = math.ceil(load / self._scaling.target_load)
        wanted = min(max(wanted, self._stage.min_replicas), self._stage.max_replicas)
        direction = (wanted > self._target) - (wanted < self._target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delay_s = self._scaling.upscale_delay_s if direction > 0 else self._scaling.downscale_delay_s
        if direction and now - (self._since or 0) >= delay_s:
            self._target, self._direction = wanted, 0
        return self._target

"""One stage as a queue in front of replicas that come and go: how long requests take, which GPUs are held for it.

First come, first served, by whichever slot is free first. Times are in seconds from the start of the day.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """What a replica of the stage is, and how many there are to be at least and at most."""

    name: str
    service_s: float
    """GPU time of one request, all its shards together."""
    num_shards: int = 1
    """GPUs of a replica, and requests that it has under way at once, each of which takes service_s."""
    min_replicas: int = 1
    """At least 1: a stage that sleeps is a stage that starts cold, and is not simulated."""
    max_replicas: int = 1


@dataclass(frozen=True)
class Scaling:
    """What the stages' config says, and what it takes until a new replica serves."""

    target_load: float
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_s: int
    cold_start_s: float


@dataclass(frozen=True)
class StageDay:
    """What became of a day's requests at one stage."""

    departures: Times
    """[N], in the order of arrival."""
    busy_gpu_s: float
    held_gpu_s: float
    held_gpus: npt.NDArray[np.int64]
    """[T], at the end of every second: loading, serving or draining."""


def simulate_stage(arrivals: Times, stage: Stage, scaling: Scaling, *, day_s: int) -> StageDay:
    """arrivals: [N], rising. Requests of the last minutes are served after the day's end."""
    if stage.min_replicas == stage.max_replicas:
        return _simulate_fixed(arrivals, stage, day_s=day_s)
    pool = Pool(stage)
    scaler = Scaler(stage, scaling)
    times = arrivals.tolist()
    departures: list[float] = []
    arrived = np.searchsorted(arrivals, np.arange(1, day_s + 1)).tolist()
    held, num_departed = [], 0
    for second in range(1, day_s + 1):
        pool.serve(times, departures, until=float(second))
        while num_departed < len(departures) and departures[num_departed] <= second:
            num_departed += 1  # in order, for every request takes as long as any other
        load = (arrived[second - 1] - num_departed) / stage.num_shards
        pool.resize(scaler.decide(load, now=second), now=float(second), cold_start_s=scaling.cold_start_s)
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
    """Request i gets the slot that request i - num_slots leaves, for all take equally long: no need to step."""
    num_slots, service_s = stage.max_replicas * stage.num_shards, stage.service_s
    rounds = math.ceil(len(arrivals) / num_slots)
    padded = np.concatenate([arrivals, np.full(rounds * num_slots - len(arrivals), np.inf)])
    before = service_s * np.arange(rounds)[:, None]  # that a slot has worked when a round begins, if never idle
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
    """The replicas: each has as many slots as shards, and a slot serves one request at a time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._born: dict[int, float] = {}
        self._slots: list[tuple[float, int]] = []  # a heap: (when it is free, of which replica)
        self._draining: list[float] = []  # when each is done
        self._retired_s = 0.0
        self._num_born = 0
        self.resize(stage.min_replicas, now=0.0, cold_start_s=0.0)

    def serve(self, arrivals: Sequence[float], departures: list[float], *, until: float) -> None:
        """Begin all requests that can begin before `until`, in order."""
        slots, service_s = self._slots, self._stage.service_s
        while len(departures) < len(arrivals):
            free, replica = slots[0]
            start = max(arrivals[len(departures)], free)
            if start >= until:
                return
            departures.append(start + service_s)
            heapq.heapreplace(slots, (start + service_s, replica))

    def resize(self, num_replicas: int, *, now: float, cold_start_s: float) -> None:
        """Replicas that are let go finish what they have begun; those that come must load first."""
        for _ in range(num_replicas - len(self._born)):
            self._born[self._num_born] = now
            for _ in range(self._stage.num_shards):
                heapq.heappush(self._slots, (now + cold_start_s, self._num_born))
            self._num_born += 1
        if num_replicas < len(self._born):
            self._retire(len(self._born) - num_replicas, now)

    def num_held(self, now: float) -> int:
        """Replicas that hold their GPUs."""
        self._draining = [done for done in self._draining if done > now]
        return len(self._born) + len(self._draining)

    def held_s(self, end_s: float) -> float:
        """Of all replicas that there ever were."""
        return self._retired_s + sum(end_s - born for born in self._born.values())

    def _retire(self, num_replicas: int, now: float) -> None:
        """Those that are done first."""
        done: dict[int, float] = {}
        for free, replica in self._slots:
            done[replica] = max(done.get(replica, now), free)
        gone = set(sorted(done, key=done.__getitem__)[:num_replicas])
        for replica in gone:
            self._retired_s += done[replica] - self._born.pop(replica)
            self._draining.append(done[replica])
        self._slots = [slot for slot in self._slots if slot[1] not in gone]
        heapq.heapify(self._slots)


class Scaler:
    """How many replicas there should be: load_policy of the cluster, between Serve's delays."""

    def __init__(self, stage: Stage, scaling: Scaling) -> None:
        self._stage, self._scaling = stage, scaling
        self._target = stage.min_replicas
        self._loads: deque[float] = deque(maxlen=scaling.look_back_s)
        self._since: int | None = None
        self._direction = 0

    def decide(self, load: float, *, now: int) -> int:
        """load: of the whole stage at this second, in what one replica has under way at once."""
        self._loads.append(load)
        mean = sum(self._loads) / len(self._loads)
        wanted = math.ceil(mean / self._scaling.target_load)
        wanted = min(max(wanted, self._stage.min_replicas), self._stage.max_replicas)
        direction = (wanted > self._target) - (wanted < self._target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delay_s = self._scaling.upscale_delay_s if direction > 0 else self._scaling.downscale_delay_s
        if direction and now - (self._since or 0) >= delay_s:
            self._target, self._direction = wanted, 0
        return self._target

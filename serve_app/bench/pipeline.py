"""Measures how well several requests fill the shards: efficiency = ideal time / measured time.

Uses the real step queue, ring and actors, with a model that only sleeps: every shard takes `step_ms` per step and
passes on `payload_mb`. S shards, 2·S requests of K steps, unmerged; the ideal time is (2·S·K + S - 1) · step_ms.
`device_map`: the same shards in one process, one request after another, as with diffusers' device_map.
`guided`: one request alone with two forwards per step, both in flight at once; the ideal time is
(S + 1)·K · step_ms. One forward after the other takes 2·S·K · step_ms, as `guided, in turn` shows.
`2S guided`: 2·S such requests of K / 2 steps, which fill the shards in either way; the ideal time is that without
guidance.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.ranks.open_transport import open_transport
from cluster.ranks.place import Rendezvous, plan_backend
from cluster.ranks.ring import Ring
from cluster.ranks.shard_group import ShardGroup, this_address, this_place
from cluster.ranks.transport import open_store
from cluster.replicas.resources import ResourceConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import Rows
from deployments.engine.constant_cache import ConstantCache, ConstantSender
from deployments.engine.cut import Boundary
from deployments.engine.demand import Demand
from deployments.engine.denoiser_stand_in import Submit
from deployments.engine.engine import Engine
from deployments.engine.merge import Merger
from deployments.engine.micro_batch import MicroBatchDriver, MicroBatchWorker
from deployments.engine.passes import Passes
from deployments.replica.lifecycle import exit_replica
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report

CPU = torch.device("cpu")
COMPONENT = "transformer"
MERGERS = {COMPONENT: Merger("PacedModel")}
"""Merger of a class for which `merge` has no rule."""
NUM_ROUNDS = 3
"""Rounds of the ring, of which the median counts: other work on the machine disturbs S processes more than one."""
RESOURCES = ResourceConfig(num_cpus=0.1)


@dataclass(frozen=True)
class Load:
    """The requests that a ring gets at once. Methods take K, the number of steps of a request without guidance."""

    is_single_node: bool = False
    """Whether there is one request, in place of 2·S."""
    num_passes: int = 1
    """Forwards per step."""
    at_once: bool = False
    """Whether all forwards of a step are submitted before the first is waited for."""

    def num_requests(self, num_shards: int) -> int:
        return 1 if self.is_single_node else 2 * num_shards

    def num_steps(self, num_steps: int) -> int:
        """Returns the steps of each request. 2·S requests have as many forwards with guidance as without."""
        return num_steps if self.is_single_node else num_steps // self.num_passes

    def num_forwards(self, num_shards: int, num_steps: int) -> int:
        """Returns the forwards of all requests."""
        return self.num_requests(num_shards) * self.num_passes * self.num_steps(num_steps)

    def num_slots(self, num_shards: int, num_steps: int) -> int:
        """Returns the ideal time of all requests, in units of step_ms."""
        if self.is_single_node:
            return (num_shards + self.num_passes - 1) * self.num_steps(num_steps)
        return self.num_forwards(num_shards, num_steps) + num_shards - 1


LOADS: Mapping[str, Load] = {
    "ring": Load(),
    "guided": Load(is_single_node=True, num_passes=2, at_once=True),
    "guided, in turn": Load(is_single_node=True, num_passes=2),
    "2S guided": Load(num_passes=2, at_once=True),
    "2S guided, in turn": Load(num_passes=2),
}

_libc = ctypes.CDLL(None)
_PR_SET_TIMERSLACK = 29
"""prctl option that sets the calling thread's timer slack in ns; from linux/prctl.h."""


def run(
    *,
    shards: tuple[int, ...],
    steps_ms: Mapping[float, int],
    payloads_mb: tuple[float, ...],
    json_file: Path | None,
) -> None:
    """Reports rows of `design`, `shards`, `step_ms`, `payload_mb`, `efficiency`, `speedup`.

    steps_ms: number of steps K of a request, by milliseconds per shard and step.
    """
    rows: list[Row] = []
    total = len(shards) * len(steps_ms) * len(payloads_mb)
    with Progress() as progress, private_ray():
        task = progress.add_task("pipeline", total=total)
        for num_shards in shards:
            with paced_replica(num_shards) as replica:
                for step_ms, num_steps in steps_ms.items():
                    for payload_mb in payloads_mb:
                        rows += _measured(replica, num_shards, step_ms, payload_mb, num_steps)
                        progress.advance(task)
    report("requests in flight over paced shards", rows, json_file)


def _measured(replica: Any, num_shards: int, step_ms: float, payload_mb: float, num_steps: int) -> Iterator[Row]:
    """Yields a row for each design. They take turns, so that drift of the machine's speed affects all alike."""
    pace = (step_ms, payload_mb)
    times: dict[str, list[float]] = {design: [] for design in LOADS}
    for _, (design, load) in product(range(NUM_ROUNDS), LOADS.items()):
        times[design].append(ray.get(replica.in_flight.remote(*pace, num_steps, load)))
    times["device_map"] = [ray.get(replica.one_by_one.remote(*pace, num_steps))]
    for design, measured_s in times.items():
        load = LOADS.get(design, Load())
        step_s = step_ms / 1e3 / statistics.median(measured_s)
        yield {
            "design": design,
            "shards": num_shards,
            "step_ms": step_ms,
            "payload_mb": payload_mb,
            "efficiency": load.num_slots(num_shards, num_steps) * step_s,
            "speedup": load.num_forwards(num_shards, num_steps) * num_shards * step_s,
        }


class PacedShard:
    """Replaces a Shard: sleeps for a given time, and passes on a given amount of data."""

    def __init__(self, *, is_last: bool) -> None:
        self._is_last = is_last
        self._outputs: dict[Any, torch.Tensor] = {}
        self._is_precise = False

    def run(
        self,
        _component: str,
        inputs: Mapping[str, Any],
        boundary: Boundary | None = None,
        rows: Sequence[Rows] = (),
    ) -> Boundary | tuple[torch.Tensor]:
        """inputs: `pace` holds [step_ms, payload_mb]."""
        if not self._is_precise:  # by default, Linux may wake this thread 50 us late
            self._is_precise = _libc.prctl(_PR_SET_TIMERSLACK, 1) == 0
        step_ms, payload_mb = inputs["pace"]
        time.sleep(step_ms / 1e3)
        if self._is_last:
            return (self._output(inputs["hidden_states"].shape, torch.float32),)
        return {"block": self._output((int(payload_mb * 1e6),), torch.uint8)}

    def _output(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if shape not in self._outputs:
            self._outputs[shape] = torch.zeros(shape, dtype=dtype)
        return self._outputs[shape]


class PacedRank:
    """An actor for ranks 1 to S - 1."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        shard = PacedShard(is_last=rank == num_ranks - 1)
        self._worker = MicroBatchWorker(shard, MERGERS, ConstantCache(CPU))

    def place(self) -> Any:
        return this_place()

    def connect(self, rendezvous: Rendezvous) -> None:
        transport = open_transport(self._rank, rendezvous, device=CPU)
        self._ring = Ring(
            self._worker.run, rank=self._rank, transport=transport, on_failure=exit_replica, device=CPU
        )
        self._ring.start()

    def alive(self) -> None:
        threading.Event().wait()


class PacedReplica:
    """An actor for rank 0, which also makes the requests."""

    def __init__(self, num_shards: int) -> None:
        torch.set_num_threads(1)
        self._num_shards = num_shards
        transport = None
        if num_shards > 1:
            self._group = group = ShardGroup(PacedRank, num_shards, RESOURCES, num_shards)
            places = group.places()
            store = open_store(this_address(), num_shards)
            rendezvous = Rendezvous(num_shards, plan_backend(places), this_address(), store.port)
            connect = partial(open_transport, 0, rendezvous, device=CPU, store=store)
            transport = group.connect(rendezvous, connect, exit_replica)
        shard = PacedShard(is_last=num_shards == 1)
        self._engine = Engine(
            MicroBatchDriver(shard, MERGERS, ConstantSender(), {COMPONENT: frozenset({"hidden_states"})}),
            MERGERS,
            TransformerConfig(shards=num_shards),
            device=CPU,
            transport=transport,
            on_lost=exit_replica,
        )

    def in_flight(self, step_ms: float, payload_mb: float, num_steps: int, load: Load) -> float:
        """Returns the seconds until the last of the load's requests is done, which begin together."""
        num_requests = load.num_requests(self._num_shards)
        start = threading.Barrier(num_requests + 1)
        inputs = {"hidden_states": torch.zeros(1, 16, 64), "pace": [step_ms, payload_mb]}
        asked = load.num_steps(num_steps)
        demand = Demand(kind=(step_ms, payload_mb), megapixels=1.0, num_steps=asked, num_own_steps=asked)

        def request() -> None:
            seat = self._engine.queue.join(demand)
            begin = partial(self._engine.begin, seat)
            submit: Submit = Passes(begin) if load.at_once else partial(self._engine.forward, seat)
            latents = inputs["hidden_states"]
            start.wait()
            for num_done in range(1, demand.num_steps + 1):
                passes = [submit(COMPONENT, inputs | {"hidden_states": latents}) for _ in range(load.num_passes)]
                latents = latents + sum(prediction for prediction, *_ in passes)
                self._engine.queue.advance(seat, num_done)
            self._engine.queue.leave(seat)

        with ThreadPoolExecutor(num_requests) as threads:
            running = [threads.submit(request) for _ in range(num_requests)]
            start.wait()
            began = time.perf_counter()
            for future in running:
                future.result()
            return time.perf_counter() - began

    def bytes_sent(self) -> int:
        """Returns the bytes sent to rank 1 since the start."""
        return self._engine.stats().bytes_sent

    def one_by_one(self, step_ms: float, payload_mb: float, num_steps: int) -> float:
        """Returns the seconds for the same requests in one process, copying each shard's output for the next."""
        shards = [PacedShard(is_last=rank == self._num_shards - 1) for rank in range(self._num_shards)]
        began = time.perf_counter()
        for _ in range(2 * self._num_shards * num_steps):
            boundary: Any = None
            for shard in shards:
                inputs = {"hidden_states": torch.zeros(1, 16, 64), "pace": [step_ms, payload_mb]}
                boundary = shard.run(COMPONENT, inputs, boundary)
                if isinstance(boundary, dict):
                    boundary = {"block": boundary["block"].clone()}
        return time.perf_counter() - began


@contextmanager
def paced_replica(num_shards: int) -> Iterator[Any]:
    group = placement_group([{"CPU": RESOURCES.num_cpus}] * num_shards, strategy="PACK")
    place = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    replica = (
        ray.remote(PacedReplica).options(num_cpus=RESOURCES.num_cpus, scheduling_strategy=place).remote(num_shards)
    )
    ray.get(replica.one_by_one.remote(0, 0, 1))
    try:
        yield replica
    finally:
        ray.kill(replica)
        remove_placement_group(group)


@contextmanager
def private_ray() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()

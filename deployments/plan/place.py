"""Assigns processes to GPUs by the shares that config gives them, as Ray will. Pure arithmetic.

Ray enforces shares, not bytes. If each share covers its process's bytes, a placement that fits by shares also fits
by bytes, whichever GPU Ray chooses; `shortfalls` lists the processes whose share does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from cluster.machines.inventory import Gpu
from cluster.scaling.balance import balance
from deployments.checkpoints.components import Stage
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.plan.sizes import STAGES, RankSizes

GIB = 2**30
_EPSILON = 1e-6
"""Tolerance of shares, which Ray counts in ten thousandths."""


@dataclass(frozen=True)
class StageDemand:
    """The replicas and GPUs that one stage needs."""

    ranks: tuple[RankSizes, ...]
    num_gpus: float
    """GPUs of each rank: a share of one, or several whole ones."""
    min_replicas: int = 1
    max_replicas: int = 1
    request_s: float = 1.0
    """Seconds per image on one replica."""
    is_auto: bool = False
    """Whether the GPUs are the only limit on replicas."""


@dataclass(frozen=True)
class Process:
    """One rank of one replica, and its GPUs."""

    stage: Stage
    replica: int
    rank: int
    sizes: RankSizes
    num_gpus: float
    gpus: tuple[Gpu, ...]
    """Empty if there is no room, or the process needs no GPU."""
    model: str = ""
    """Name of its model, if that is not the planned one."""

    def __str__(self) -> str:
        of = f"{self.model} " if self.model else ""
        return f"{of}{self.stage} {self.replica}" + (f" rank {self.rank}" if self.stage == "denoise" else "")

    def bytes_on(self, gpu: Gpu) -> int:
        """Returns the bytes that it needs on this GPU; weights are spread evenly over its GPUs."""
        if gpu not in self.gpus:
            return 0
        return self.sizes.need_bytes - self.sizes.device_bytes * (len(self.gpus) - 1) // len(self.gpus)


@dataclass(frozen=True)
class Placement:
    """The processes of all replicas, with their GPUs."""

    gpus: tuple[Gpu, ...]
    processes: tuple[Process, ...]
    beside: tuple[Process, ...] = ()
    """Processes of other models that run at the same time."""

    def on(self, gpu: Gpu) -> list[Process]:
        return [process for process in (*self.beside, *self.processes) if gpu in process.gpus]

    def left(self, gpu: Gpu) -> float:
        """Returns the free share of a GPU."""
        return 1.0 - sum(min(1.0, process.num_gpus) for process in self.on(gpu))

    def used_bytes(self, gpu: Gpu) -> int:
        """Returns the bytes needed on a GPU. Of processes that share its time, the largest and the others' CUDA
        contexts count."""
        steady = sum(process.bytes_on(gpu) for process in self.on(gpu) if not process.sizes.shares_time)
        shared = [process.bytes_on(gpu) - OVERHEAD_BYTES for process in self.on(gpu) if process.sizes.shares_time]
        return steady + max(shared, default=0) + OVERHEAD_BYTES * len(shared)

    def num_replicas(self, stage: Stage) -> int:
        return len({process.replica for process in self.processes if process.stage == stage})

    def is_complete(self) -> bool:
        """Whether every process that needs a GPU has one."""
        return all(process.gpus or not process.num_gpus for process in self.processes)

    def crowded_groups(self) -> list[int]:
        """Returns the denoiser's replicas that have two shards on one GPU."""
        found: dict[int, list[Gpu]] = {}
        for process in self.processes:
            if process.stage == "denoise":
                found.setdefault(process.replica, []).extend(process.gpus)
        return [replica for replica, gpus in found.items() if len(set(gpus)) < len(gpus)]

    def split_groups(self) -> list[int]:
        """Returns the denoiser's replicas whose shards are on several nodes."""
        nodes: dict[int, set[int]] = {}
        for process in self.processes:
            if process.stage == "denoise":
                nodes.setdefault(process.replica, set()).update(gpu.node for gpu in process.gpus)
        return [replica for replica, found in nodes.items() if len(found) > 1]

    def split_forwards(self) -> list[int]:
        """Returns the denoiser's replicas in which ranks that share each forward are on several nodes."""
        nodes: dict[tuple[int, int], set[int]] = {}
        for process in self.processes:
            group = process.replica, process.rank // process.sizes.degree
            if process.stage == "denoise" and process.sizes.degree > 1:
                nodes.setdefault(group, set()).update(gpu.node for gpu in process.gpus)
        return sorted({replica for (replica, _), found in nodes.items() if len(found) > 1})

    def shortfalls(self) -> list[str]:
        """Returns a sentence for each process or GPU that does not fit, with the missing bytes."""
        found = []
        for process in self.processes:
            if process.num_gpus and not process.gpus:
                found.append(
                    f"{process} has no place: no GPU has {share(process.num_gpus)} left "
                    f"(it needs {gib(process.sizes.need_bytes)})"
                )
            for gpu in process.gpus:
                granted, needed = int(min(1.0, process.num_gpus) * gpu.memory_bytes), process.bytes_on(gpu)
                if needed > granted and not process.sizes.shares_time:
                    found.append(
                        f"{process} needs {gib(needed)} on {gpu}, but its share, {share(process.num_gpus)} of "
                        f"{gib(gpu.memory_bytes)}, is {gib(granted)}: {gib(needed - granted)} too little; give it "
                        f"num_gpus {share_for(needed, gpu)}"
                    )
        for gpu in self.gpus:
            missing = self.used_bytes(gpu) - gpu.memory_bytes
            if missing > 0:
                found.append(
                    f"{gpu} has {gib(gpu.memory_bytes)}: {gib(missing)} too little for all that is placed there"
                )
        return found


def plan_placement(
    demands: Mapping[Stage, StageDemand],
    gpus: Sequence[Gpu],
    order: Sequence[Stage] | None = None,
    beside: Sequence[Process] = (),
) -> Placement:
    """Places every stage's fewest replicas, then as many more as there is room for, up to its most.

    Further replicas go to the slowest stage first, as on the cluster.

    Args:
        order: of the stages for their fewest replicas; None: the stage with the largest num_gpus first.
        beside: processes of other models that are placed already.
    """
    others = Placement(tuple(gpus), (), tuple(beside))
    free = {gpu: others.left(gpu) for gpu in gpus}
    processes: list[Process] = []
    order = order or sorted(demands, key=lambda stage: -demands[stage].num_gpus)
    counts = dict.fromkeys(order, 0)
    for stage in order:
        for _ in range(max(1, demands[stage].min_replicas)):
            processes += _place_replica(stage, counts[stage], demands[stage], free) or _unplaced(
                stage, counts[stage], demands[stage]
            )
            counts[stage] += 1

    def grow(stage: Stage) -> bool:
        more = _place_replica(stage, counts[stage], demands[stage], free) if demands[stage].num_gpus else []
        processes.extend(more)
        counts[stage] += bool(more)
        return bool(more)

    times = {stage: demands[stage].request_s for stage in order}
    balance(counts, times, {stage: demands[stage].max_replicas for stage in order}, grow)
    ordered = sorted(processes, key=lambda process: (STAGES.index(process.stage), process.replica, process.rank))
    return Placement(tuple(gpus), tuple(ordered), tuple(beside))


def blocked_by_order(
    demands: Mapping[Stage, StageDemand], gpus: Sequence[Gpu], beside: Sequence[Process] = ()
) -> tuple[Stage, ...] | None:
    """Returns an order of starting the stages in which some process finds no place; None if every order works.

    Ray starts the stages of an app at once, and packs shares of a GPU: two small stages that are meant for two
    GPUs may start first, fill up one GPU, and leave no room for a shard group, permanently.
    """
    return next(
        (
            order
            for order in permutations(demands)
            if not plan_placement(demands, gpus, order, beside).is_complete()
        ),
        None,
    )


def _place_replica(stage: Stage, replica: int, demand: StageDemand, free: dict[Gpu, float]) -> list[Process]:
    """Places a replica on one node if one has room for all ranks, else on several. Empty if there is no room.

    Takes the shares from `free`.
    """
    if not demand.num_gpus:
        return _unplaced(stage, replica, demand)
    nodes = sorted({gpu.node for gpu in free})
    for candidates in [*([gpu for gpu in free if gpu.node == node] for node in nodes), list(free)]:
        left = {gpu: free[gpu] for gpu in candidates}
        chosen = [_choose(demand.num_gpus, left) for _ in demand.ranks]
        if all(chosen):
            free |= left
            return [
                Process(stage, replica, rank, sizes, demand.num_gpus, found)
                for rank, (sizes, found) in enumerate(zip(demand.ranks, chosen, strict=True))
            ]
    return []


def _unplaced(stage: Stage, replica: int, demand: StageDemand) -> list[Process]:
    return [Process(stage, replica, rank, sizes, demand.num_gpus, ()) for rank, sizes in enumerate(demand.ranks)]


def _choose(num_gpus: float, left: dict[Gpu, float]) -> tuple[Gpu, ...]:
    """Returns the fullest GPU that has room, as Ray does, or several empty ones. Takes the shares from `left`."""
    if num_gpus > 1:
        empty = [gpu for gpu, rest in left.items() if rest > 1 - _EPSILON][: int(num_gpus)]
        if len(empty) < num_gpus:
            return ()
        left.update(dict.fromkeys(empty, 0.0))
        return tuple(empty)
    fitting = [gpu for gpu, rest in left.items() if rest >= num_gpus - _EPSILON]
    if not fitting:
        return ()
    gpu = min(fitting, key=lambda one: (left[one], one.node, one.index))
    left[gpu] -= num_gpus
    return (gpu,)


def share_for(num_bytes: int, gpu: Gpu) -> float:
    """Returns the least num_gpus that covers so many bytes of this GPU; above 1 if the GPU is too small."""
    return math.ceil(1000 * num_bytes / gpu.memory_bytes) / 1000


def gib(num_bytes: float) -> str:
    """Returns text such as `11.24 GiB`."""
    return f"{num_bytes / GIB:.2f} GiB"


def share(num_gpus: float) -> str:
    """Returns text such as `0.8 GPU`."""
    return f"{num_gpus:g} GPU" + ("s" if num_gpus > 1 else "")

"""Processes to GPUs, by the shares that config gives them, as Ray will: pure arithmetic.

Ray keeps to shares, not to bytes. A share that covers its process's bytes makes the two the same, whichever GPU
Ray chooses; `shortfalls` tells where one does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.plan.sizes import STAGES, RankSizes

GIB = 2**30
_EPSILON = 1e-6
"""Ray counts shares in ten thousandths."""


@dataclass(frozen=True)
class Demand:
    """What one stage asks for."""

    ranks: tuple[RankSizes, ...]
    num_gpus: float
    """Of each rank: a share of one GPU, or several whole ones."""
    min_replicas: int = 1
    max_replicas: int = 1


@dataclass(frozen=True)
class Process:
    """One rank of one replica, and where it goes."""

    stage: Stage
    replica: int
    rank: int
    sizes: RankSizes
    num_gpus: float
    gpus: tuple[Gpu, ...]
    """None where there is no room, or no GPU is asked for."""
    model: str = ""
    """Whose it is, where that is another one than is planned."""

    def __str__(self) -> str:
        of = f"{self.model} " if self.model else ""
        return f"{of}{self.stage} {self.replica}" + (f" rank {self.rank}" if self.stage == "denoise" else "")

    def bytes_on(self, gpu: Gpu) -> int:
        """What it needs there; weights are spread evenly over several GPUs."""
        if gpu not in self.gpus:
            return 0
        return self.sizes.need_bytes - self.sizes.device_bytes * (len(self.gpus) - 1) // len(self.gpus)


@dataclass(frozen=True)
class Placement:
    """Of all replicas."""

    gpus: tuple[Gpu, ...]
    processes: tuple[Process, ...]
    beside: tuple[Process, ...] = ()
    """Of other models, which are there at the same time."""

    def on(self, gpu: Gpu) -> list[Process]:
        return [process for process in (*self.beside, *self.processes) if gpu in process.gpus]

    def left(self, gpu: Gpu) -> float:
        """Of its shares, those that nobody has."""
        return 1.0 - sum(min(1.0, process.num_gpus) for process in self.on(gpu))

    def used_bytes(self, gpu: Gpu) -> int:
        """Of those that take turns the largest counts, and of the others their CUDA contexts."""
        steady = sum(process.bytes_on(gpu) for process in self.on(gpu) if not process.sizes.takes_turns)
        turns = [process.bytes_on(gpu) - OVERHEAD_BYTES for process in self.on(gpu) if process.sizes.takes_turns]
        return steady + max(turns, default=0) + OVERHEAD_BYTES * len(turns)

    def num_replicas(self, stage: Stage) -> int:
        return len({process.replica for process in self.processes if process.stage == stage})

    def has_room(self) -> bool:
        """Whether every process that asks for a GPU has found one."""
        return all(process.gpus or not process.num_gpus for process in self.processes)

    def crowded_groups(self) -> list[int]:
        """Replicas of the denoiser two of whose shards lie on one GPU."""
        found: dict[int, list[Gpu]] = {}
        for process in self.processes:
            if process.stage == "denoise":
                found.setdefault(process.replica, []).extend(process.gpus)
        return [replica for replica, gpus in found.items() if len(set(gpus)) < len(gpus)]

    def split_groups(self) -> list[int]:
        """Replicas of the denoiser whose shards lie on several nodes."""
        nodes: dict[int, set[int]] = {}
        for process in self.processes:
            if process.stage == "denoise":
                nodes.setdefault(process.replica, set()).update(gpu.node for gpu in process.gpus)
        return [replica for replica, found in nodes.items() if len(found) > 1]

    def split_forwards(self) -> list[int]:
        """Replicas of the denoiser where ranks that share each forward lie on several nodes."""
        nodes: dict[tuple[int, int], set[int]] = {}
        for process in self.processes:
            group = process.replica, process.rank // process.sizes.degree
            if process.stage == "denoise" and process.sizes.degree > 1:
                nodes.setdefault(group, set()).update(gpu.node for gpu in process.gpus)
        return sorted({replica for (replica, _), found in nodes.items() if len(found) > 1})

    def shortfalls(self) -> list[str]:
        """One sentence per process that does not fit, and by how much; none if the plan holds."""
        found = []
        for process in self.processes:
            if process.num_gpus and not process.gpus:
                found.append(
                    f"{process} has no place: no GPU has {share(process.num_gpus)} left "
                    f"(it needs {gib(process.sizes.need_bytes)})"
                )
            for gpu in process.gpus:
                granted, needed = int(min(1.0, process.num_gpus) * gpu.memory_bytes), process.bytes_on(gpu)
                if needed > granted and not process.sizes.takes_turns:
                    found.append(
                        f"{process} needs {gib(needed)} on {gpu}, and its share, {share(process.num_gpus)} of "
                        f"{gib(gpu.memory_bytes)}, is {gib(granted)}: {gib(needed - granted)} too little; give it "
                        f"num_gpus {share_for(needed, gpu)}"
                    )
        for gpu in self.gpus:
            missing = self.used_bytes(gpu) - gpu.memory_bytes
            if missing > 0:
                found.append(
                    f"{gpu} has {gib(gpu.memory_bytes)}: {gib(missing)} too little for all that lies there"
                )
        return found


def place(
    demands: Mapping[Stage, Demand],
    gpus: Sequence[Gpu],
    order: Sequence[Stage] | None = None,
    beside: Sequence[Process] = (),
) -> Placement:
    """Every stage's fewest replicas, then as many more as there is room for, up to its most, round by round.

    Args:
        order: in which the stages come; None: what asks for most comes first.
        beside: processes of other models that have their places.
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
    grown = True
    while grown:
        grown = False
        for stage in order:
            if counts[stage] < demands[stage].max_replicas:
                more = _place_replica(stage, counts[stage], demands[stage], free)
                if more and all(process.gpus for process in more):
                    processes += more
                    counts[stage] += 1
                    grown = True
    ordered = sorted(processes, key=lambda process: (STAGES.index(process.stage), process.replica, process.rank))
    return Placement(tuple(gpus), tuple(ordered), tuple(beside))


def blocked_by_order(
    demands: Mapping[Stage, Demand], gpus: Sequence[Gpu], beside: Sequence[Process] = ()
) -> tuple[Stage, ...] | None:
    """An order of start in which some process finds no place, though in another all do; None if there is none.

    Ray starts the stages of an app at once, and packs shares of a GPU: two small stages that are meant to lie on
    two GPUs may come first, fill up one, and leave a shard group no room, for good.
    """
    return next(
        (order for order in permutations(demands) if not place(demands, gpus, order, beside).has_room()),
        None,
    )


def _place_replica(stage: Stage, replica: int, demand: Demand, free: dict[Gpu, float]) -> list[Process]:
    """On one node if one has room for all ranks, else wherever there is any; empty if there is none."""
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


def _unplaced(stage: Stage, replica: int, demand: Demand) -> list[Process]:
    return [Process(stage, replica, rank, sizes, demand.num_gpus, ()) for rank, sizes in enumerate(demand.ranks)]


def _choose(num_gpus: float, left: dict[Gpu, float]) -> tuple[Gpu, ...]:
    """The fullest GPU that has room, as Ray does; or so many empty ones. Takes them from `left`."""
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
    """The least num_gpus that covers so much of this GPU; above 1 where none does."""
    return math.ceil(1000 * num_bytes / gpu.memory_bytes) / 1000


def gib(num_bytes: float) -> str:
    """`11.24 GiB`."""
    return f"{num_bytes / GIB:.2f} GiB"


def share(num_gpus: float) -> str:
    """`0.8 GPU`."""
    return f"{num_gpus:g} GPU" + ("s" if num_gpus > 1 else "")

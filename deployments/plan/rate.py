"""How many pictures a second a placement can serve at most, from measured times, and how busy each GPU is then."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.plan.place import Placement, Process
from deployments.plan.profile import Times
from deployments.plan.sizes import STAGES


@dataclass(frozen=True)
class Rate:
    """An upper bound: no queueing, no hand-off, every pipeline full, forwards shared at no cost. Merging may raise
    it."""

    stage_s: Mapping[Stage, float]
    """Of one picture on one replica, t_i; of the denoiser the slowest rank's."""
    stage_bounds: Mapping[Stage, float]
    """Pictures per second, replicas_i / t_i."""
    bound: float
    """Pictures per second: the least of those, and of what each GPU can do for all that share it."""
    gpu_use: Mapping[Gpu, float]
    """Share of time at that bound."""


def bound_rate(placement: Placement, times: Times) -> Rate:
    """min(replicas_i / t_i), and no GPU busy for more than all of the time."""
    seconds = {process: seconds_of(process, times) for process in placement.processes}
    stage_s = {stage: max(seconds[p] for p in placement.processes if p.stage == stage) for stage in STAGES}
    bounds = {stage: placement.num_replicas(stage) / stage_s[stage] for stage in STAGES}
    gpu_s = {
        gpu: sum(seconds[process] / placement.num_replicas(process.stage) for process in placement.on(gpu))
        for gpu in placement.gpus
    }
    bound = min([*bounds.values(), *(1 / busy_s for busy_s in gpu_s.values() if busy_s)])
    return Rate(stage_s, bounds, bound, {gpu: bound * busy_s for gpu, busy_s in gpu_s.items()})


def seconds_of(process: Process, times: Times) -> float:
    """Of one picture on this process."""
    if process.stage == "denoise":
        return times.rank_s(process.sizes.blocks) / process.sizes.degree
    return times.encode_s if process.stage == "encode" else times.decode_s

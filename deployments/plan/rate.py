"""The most images per second that a placement can serve, from measured times, and how busy each GPU then is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.machines.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.plan.place import Placement, Process
from deployments.plan.profile import Times
from deployments.plan.sizes import STAGES, RankSizes

ASSUMED_S: Mapping[Stage, float] = {"encode": 0.26, "denoise": 25.3, "decode": 0.31}
"""Seconds per image if nothing was measured; only their ratio matters. Source: Qwen-Image-2512, 50 steps, on H100
(LightX2V's blog post on disaggregation)."""


@dataclass(frozen=True)
class Rate:
    """An upper bound of throughput: without queueing or hand-off, with full pipelines, and with forwards shared at
    no cost. Merging may raise it."""

    stage_s: Mapping[Stage, float]
    """Seconds per image on one replica, t_i; for the denoiser, those of the slowest rank."""
    stage_bounds: Mapping[Stage, float]
    """Images per second, replicas_i / t_i."""
    bound: float
    """Images per second: the least of `stage_bounds` and of what each GPU can do for all processes on it."""
    gpu_use: Mapping[Gpu, float]
    """Share of time in which each GPU is busy at that bound."""


def bound_rate(placement: Placement, times: Times) -> Rate:
    """Returns min(replicas_i / t_i), or less if a GPU would be busy for more than all of the time."""
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
    """Returns the seconds per image on this process."""
    return request_s(process.stage, (process.sizes,), times)


def request_s(stage: Stage, ranks: Sequence[RankSizes], times: Times | None) -> float:
    """Returns the seconds per image on one replica with these ranks: for the denoiser the slowest rank's."""
    if times is None:
        return ASSUMED_S[stage] / len(ranks)
    if stage != "denoise":
        return times.encode_s if stage == "encode" else times.decode_s
    return max(times.rank_s(rank.blocks) / rank.degree for rank in ranks)

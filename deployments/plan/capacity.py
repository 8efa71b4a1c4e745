"""Checks whether the available GPUs suffice for an app: what is missing for certain, and what may be missing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.machines.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.memory.limit import plan_limit
from deployments.plan.place import Placement, Process, StageDemand, gib, plan_placement, share_for
from deployments.plan.plan import StageConfigs
from deployments.plan.sizes import ModelSizes, RankSizes


@dataclass(frozen=True)
class Shortage:
    """What an app lacks, in sentences."""

    surely: tuple[str, ...]
    """Not even one replica of every stage has a place, or weights alone exceed a GPU or their share of it."""
    perhaps: tuple[str, ...]
    """Further replicas have no place, or memory is tight: working memory and CUDA's own are only estimates."""


def find_shortage(
    stages: StageConfigs,
    sizes: ModelSizes | None,
    gpus: Sequence[Gpu],
    *,
    shared: Collection[Stage] = (),
    beside: Sequence[Process] = (),
) -> Shortage:
    """Returns what an app lacks. Stages with node labels are left out, because only Ray knows where they may go.

    Args:
        sizes: None if the GPUs' memory is not known; then only shares and shard groups are checked.
        shared: stages that belong to another model.
        beside: processes of other models that run at the same time.
    """
    demands = gpu_demands(stages, sizes, shared)
    one = {stage: replace(d, min_replicas=1, max_replicas=1) for stage, d in demands.items()}
    first = plan_placement(one, gpus, beside=beside)
    if not first.is_complete():
        return Shortage((_no_place(demands, first),), ())
    whole = plan_placement(demands, gpus, beside=beside)
    missing = {f"{process.stage} {process.replica}" for process in whole.processes if not process.gpus}
    few = [f"no room for {', '.join(sorted(missing))}: {_in_words(gpus)}"] if missing else []
    if sizes is None:
        return Shortage((), tuple(few))
    if stages.encoder.device_map or stages.transformer.device_map:  # the rest goes to the CPU and to disk
        return Shortage((), (*few, *_too_heavy(first)))
    largest = max(gpu.memory_bytes for gpu in gpus)  # only Ray knows which GPU it will choose
    large = {gpu: replace(gpu, memory_bytes=largest) for gpu in gpus}
    others = [replace(process, gpus=tuple(large[gpu] for gpu in process.gpus)) for process in beside]
    best = plan_placement(one, list(large.values()), beside=others)
    surely = (*_too_heavy(best), *_over_limit(stages, best))
    return Shortage(surely, (*few, *(() if surely else first.shortfalls())))


def gpu_demands(
    stages: StageConfigs, sizes: ModelSizes | None, shared: Collection[Stage] = ()
) -> dict[Stage, StageDemand]:
    """Returns what the stages that need GPUs demand for their fewest replicas. Arguments as for find_shortage."""
    return {
        stage: StageDemand(
            (RankSizes(0, 0, 0),) * config.num_ranks
            if sizes is None or config.device == "cpu"
            else sizes.stage(stage).ranks,
            config.num_gpus,
            config.min_replicas,
            max(1, config.min_replicas),
        )
        for stage, config in stages.by_stage().items()
        if config.num_gpus and not config.label_selector and stage not in shared
    }


def _no_place(demands: Mapping[Stage, StageDemand], placement: Placement) -> str:
    unplaced = {process.stage for process in placement.processes if not process.gpus}
    asked = ", ".join(f"{stage} {len(demand.ranks)} x {demand.num_gpus:g}" for stage, demand in demands.items())
    return (
        f"{' and '.join(sorted(unplaced))} would find no GPU: one replica of every stage takes {asked} GPU, and "
        f"the cluster has {_in_words(placement.gpus)}; lower num_gpus or shards, or add GPUs (relay plan)"
    )


def _in_words(gpus: Sequence[Gpu]) -> str:
    """Returns text such as `2 GPUs on node 0, 1 GPU on node 1`."""
    nodes = sorted({gpu.node for gpu in gpus})
    counts = [sum(gpu.node == node for gpu in gpus) for node in nodes]
    found = [f"{n} GPU{'s' * (n > 1)} on node {node}" for n, node in zip(counts, nodes, strict=True)]
    return ", ".join(found) or "no GPU"


def _too_heavy(placement: Placement) -> Iterator[str]:
    """Yields a sentence for each GPU that weights alone exceed, because their bytes are known exactly.

    Stages that share a GPU's time have their weights there one after another.
    """
    for gpu in placement.gpus:
        found = [(process, process.sizes.device_bytes // len(process.gpus)) for process in placement.on(gpu)]
        steady = sum(held for process, held in found if not process.sizes.shares_time)
        needed = steady + max((held for process, held in found if process.sizes.shares_time), default=0)
        if needed > gpu.memory_bytes:
            yield (
                f"{gpu} has {gib(gpu.memory_bytes)}: {gib(needed - gpu.memory_bytes)} too little for the weights "
                f"of {', '.join(str(process) for process, _ in found)} ({gib(needed)}), let alone working memory; "
                "relay plan proposes what fits"
            )


def _over_limit(stages: StageConfigs, placement: Placement) -> Iterator[str]:
    """Yields a sentence for each process whose weights exceed its fraction of a GPU: its loading would fail."""
    for process in placement.processes:
        config, held = stages.by_stage()[process.stage], process.sizes.device_bytes
        for gpu in process.gpus:
            limit = plan_limit(config, gpu.memory_bytes)
            if limit is not None and limit.is_capped and held > limit.num_bytes:
                yield (
                    f"{process} may fill {gib(limit.num_bytes)} ({limit.reason}), but has {gib(held)} of weights: "
                    f"give it num_gpus {share_for(process.sizes.need_bytes, gpu)}"
                )

"""What an app that is about to start lacks on the GPUs that are there: surely, or perhaps."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.memory.limit import plan_limit
from deployments.plan.place import Demand, Placement, Process, gib, place, share_for
from deployments.plan.plan import StageConfigs
from deployments.plan.sizes import ModelSizes, RankSizes


@dataclass(frozen=True)
class Lack:
    """One sentence each."""

    surely: tuple[str, ...]
    """Not even one replica of every stage has a place, or weights alone exceed a GPU or their share of it."""
    perhaps: tuple[str, ...]
    """Further replicas have none, or it is close: working memory and what CUDA takes are estimates."""


def find_lack(
    stages: StageConfigs,
    sizes: ModelSizes | None,
    gpus: Sequence[Gpu],
    *,
    shared: Collection[Stage] = (),
    beside: Sequence[Process] = (),
) -> Lack:
    """A stage that chooses its nodes by labels is left out: only Ray knows where it may go.

    Args:
        sizes: None where the GPUs' memory is not known; then shares and shard groups are all that is looked at.
        shared: stages that are another model's.
        beside: processes of other models that are there at the same time.
    """
    demands = room_demands(stages, sizes, shared)
    one = {stage: replace(d, min_replicas=1, max_replicas=1) for stage, d in demands.items()}
    first = place(one, gpus, beside=beside)
    if not first.has_room():
        return Lack((_no_room(demands, first),), ())
    whole = place(demands, gpus, beside=beside)
    missing = {f"{process.stage} {process.replica}" for process in whole.processes if not process.gpus}
    few = [f"no room for {', '.join(sorted(missing))}: {_in_words(gpus)}"] if missing else []
    if sizes is None:
        return Lack((), tuple(few))
    if stages.encoder.device_map or stages.transformer.device_map:  # too much for GPUs goes to the CPU and to disk
        return Lack((), (*few, *_too_heavy(first)))
    largest = max(gpu.memory_bytes for gpu in gpus)  # only Ray knows which of several sizes it will choose
    large = {gpu: replace(gpu, memory_bytes=largest) for gpu in gpus}
    others = [replace(process, gpus=tuple(large[gpu] for gpu in process.gpus)) for process in beside]
    best = place(one, list(large.values()), beside=others)
    surely = (*_too_heavy(best), *_over_limit(stages, best))
    return Lack(surely, (*few, *(() if surely else first.shortfalls())))


def room_demands(
    stages: StageConfigs, sizes: ModelSizes | None, shared: Collection[Stage] = ()
) -> dict[Stage, Demand]:
    """What the stages that must have a GPU ask for, each its fewest replicas. sizes, shared: as of find_lack."""
    return {
        stage: Demand(
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


def _no_room(demands: Mapping[Stage, Demand], placement: Placement) -> str:
    unplaced = {process.stage for process in placement.processes if not process.gpus}
    asked = ", ".join(f"{stage} {len(demand.ranks)} x {demand.num_gpus:g}" for stage, demand in demands.items())
    return (
        f"{' and '.join(sorted(unplaced))} would find no GPU: one replica of every stage takes {asked} GPU, and "
        f"the cluster has {_in_words(placement.gpus)}; lower num_gpus or shards, or add GPUs (relay plan)"
    )


def _in_words(gpus: Sequence[Gpu]) -> str:
    """`2 GPUs on node 0, 1 GPU on node 1`."""
    nodes = sorted({gpu.node for gpu in gpus})
    counts = [sum(gpu.node == node for gpu in gpus) for node in nodes]
    found = [f"{n} GPU{'s' * (n > 1)} on node {node}" for n, node in zip(counts, nodes, strict=True)]
    return ", ".join(found) or "no GPU"


def _too_heavy(placement: Placement) -> Iterator[str]:
    """Weights are known to the byte; stages by turns have theirs there one after another."""
    for gpu in placement.gpus:
        found = [(process, process.sizes.device_bytes // len(process.gpus)) for process in placement.on(gpu)]
        steady = sum(held for process, held in found if not process.sizes.takes_turns)
        needed = steady + max((held for process, held in found if process.sizes.takes_turns), default=0)
        if needed > gpu.memory_bytes:
            yield (
                f"{gpu} has {gib(gpu.memory_bytes)}: {gib(needed - gpu.memory_bytes)} too little for the weights "
                f"of {', '.join(str(process) for process, _ in found)} ({gib(needed)}), let alone working memory; "
                "relay plan proposes what fits"
            )


def _over_limit(stages: StageConfigs, placement: Placement) -> Iterator[str]:
    """A fraction of a GPU is a cap that loading would run into."""
    for process in placement.processes:
        config, held = stages.by_stage()[process.stage], process.sizes.device_bytes
        for gpu in process.gpus:
            limit = plan_limit(config, gpu.memory_bytes)
            if limit is not None and limit.is_capped and held > limit.num_bytes:
                yield (
                    f"{process} may fill {gib(limit.num_bytes)} ({limit.reason}), and has {gib(held)} of weights: "
                    f"give it num_gpus {share_for(process.sizes.need_bytes, gpu)}"
                )

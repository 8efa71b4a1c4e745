"""What a plan advises against, a sentence each: splitting what fits, sharding UNets, empty pipelines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.config import StageConfig, TransformerConfig
from deployments.families.parallel import CONTEXT_PARALLEL
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.plan.place import Demand, Placement, blocked_by_order, gib, share
from deployments.plan.profile import Times
from deployments.plan.sizes import ModelSizes, RankSizes, largest

FEW_TENSOR_RANKS = 2
SMALL_PIXELS = 1024 * 1024
WORTH_TELLING = 1.03
"""By how much faster other cuts must be."""


@dataclass(frozen=True)
class Admitted:
    """What the app lets in."""

    max_concurrent_requests: int
    max_pixels: int
    """Width times height."""
    max_num_frames: int


def advise(
    sizes: ModelSizes,
    transformer: TransformerConfig,
    stages: Sequence[StageConfig],
    demands: Mapping[Stage, Demand],
    placement: Placement,
    times: Times | None,
    admitted: Admitted,
) -> tuple[str, ...]:
    """stages: all three."""
    found = [
        *_on_splitting(sizes, transformer, placement),
        *_on_shards(sizes, transformer, admitted.max_concurrent_requests),
        *_on_sharing(sizes, transformer, placement),
        *_on_limits(sizes, admitted),
    ]
    for config in stages:
        name = type(config).__name__.removesuffix("Config").lower()
        if config.num_gpus and config.dtype == "float32":
            found.append(f"{name}.dtype is float32: bfloat16 halves its weights and is faster on GPUs")
        if config.num_gpus > 1 and getattr(config, "device_map", None) is None:
            found.append(f"{name}.num_gpus {config.num_gpus:g} without device_map uses one GPU only: use shards")
    if times is not None and transformer.num_shards > 1:
        found += _on_cuts(sizes, times)
    for replica in placement.crowded_groups():
        found.append(
            f"two shards of denoise {replica} lie on one GPU, which NCCL refuses: transformer.num_gpus above 0.5"
        )
    order = blocked_by_order(demands, placement.gpus, placement.beside) if placement.has_room() else None
    if order is not None:
        found.append(
            f"if Ray happens to start {', then '.join(order)}, some process finds no GPU, and waits for good: "
            "choose num_gpus so that all three stages' sum to 1 at most, or give one a GPU of its own"
        )
    found += _on_fragments(demands, placement)
    for replica in placement.split_groups():
        found.append(f"the shards of denoise {replica} lie on several nodes: every step crosses the network")
    idle = [str(gpu) for gpu in placement.gpus if not placement.on(gpu)]
    if idle:
        found.append(f"nothing lies on {', '.join(idle)}: raise transformer.max_replicas or shards")
    return tuple(found)


def whole_bytes(sizes: ModelSizes) -> int:
    """What one GPU would need for one replica of all three stages, the denoisers as one shard."""
    others = [*sizes.encode.ranks, *sizes.decode.ranks]
    return sum(rank.weights_bytes + rank.working_bytes + OVERHEAD_BYTES for rank in others) + (
        _whole_rank(sizes).need_bytes
    )


def _whole_rank(sizes: ModelSizes) -> RankSizes:
    """Of all denoisers in one process."""
    weights = sum(of.weights_bytes for of in sizes.denoisers)
    return RankSizes(weights, weights, max(rank.working_bytes for rank in sizes.denoise.ranks))


def _on_splitting(sizes: ModelSizes, transformer: TransformerConfig, placement: Placement) -> Iterator[str]:
    largest = max((gpu.memory_bytes for gpu in placement.gpus), default=0)
    needed = whole_bytes(sizes)
    if needed > largest:
        return
    fits = f"all three stages fit on one GPU ({gib(needed)} of {gib(largest)})"
    if transformer.num_shards > 1:
        yield (
            f"{fits}: shards give one request no speed-up; rather a whole replica on each GPU (shards: 1)"
            + (", or context_parallel for requests that are done sooner" if _all_share(sizes) else "")
        )
    elif placement.num_replicas("denoise") == 1 and len(_used_gpus(placement)) > 1:
        yield (
            f"{fits}: a GPU of their own for encoder and VAE changes a request's time by less than 1 % "
            "(published, vLLM-Omni); rather a second replica of the transformer there"
        )


def _on_shards(sizes: ModelSizes, transformer: TransformerConfig, max_concurrent_requests: int) -> Iterator[str]:
    num_shards = transformer.num_shards
    if num_shards == 1:
        return
    if sizes.is_unet:
        held = [rank.weights_bytes for rank in sizes.denoise.ranks]
        yield (
            f"a UNet in {num_shards} shards: its blocks are coarse (the fullest rank has "
            f"{max(held) / sum(held):.0%}) and its skips cross every cut; keep it whole and add replicas"
        )
    at_once = min(transformer.max_ongoing_requests, max_concurrent_requests)
    if at_once < num_shards:
        yield f"{num_shards} shards and at most {at_once} requests at once: some shard always waits; fewer shards"
    elif at_once < 2 * num_shards:
        yield f"{num_shards} shards are kept full by {2 * num_shards} requests; at most {at_once} are let in"


def _on_sharing(sizes: ModelSizes, transformer: TransformerConfig, placement: Placement) -> Iterator[str]:
    """Ranks that share each forward make one request faster; shards and replicas serve more of them."""
    degree, asked = transformer.parallel_degree, largest(sizes.sizes)
    if degree == 1:
        num_replicas = placement.num_replicas("denoise")
        if num_replicas > 1 and _all_share(sizes):
            yield f"{num_replicas} replicas are for throughput; for latency fewer, each of context_parallel ranks"
        return
    gpu_bytes = max((gpu.memory_bytes for gpu in placement.gpus), default=0)
    if transformer.num_shards == 1 and _whole_rank(sizes).need_bytes <= gpu_bytes:
        yield (
            f"for latency: {degree} ranks share each forward, though one GPU has room for all of the denoiser; "
            f"for throughput rather {degree} replicas, which tell each other nothing"
        )
        if transformer.tensor_parallel > 1 and _all_share(sizes):
            yield "context_parallel exchanges less than tensor_parallel, which is for weights too large for a GPU"
    if transformer.tensor_parallel > FEW_TENSOR_RANKS and asked.width * asked.height <= SMALL_PIXELS:
        yield (
            f"tensor_parallel {transformer.tensor_parallel} at {asked}: every block adds up all of its tokens "
            f"twice over the ranks, and at this size more than {FEW_TENSOR_RANKS} wait for that longer than they "
            f"compute; tensor_parallel: {FEW_TENSOR_RANKS}, and more shards"
        )
    for replica in placement.split_forwards():
        yield (
            f"ranks of denoise {replica} that share each forward lie on several nodes: every block waits for the "
            "network; fewer ranks, which fit one node"
        )


def _all_share(sizes: ModelSizes) -> bool:
    """Whether context_parallel is to be had."""
    names = {of.name for of in sizes.denoisers}
    return all(of.class_name in CONTEXT_PARALLEL for of in sizes.denoise.components if of.name in names)


def _on_limits(sizes: ModelSizes, admitted: Admitted) -> Iterator[str]:
    most = largest(sizes.sizes)
    if admitted.max_pixels > most.width * most.height:
        yield (
            f"requests of up to {admitted.max_pixels} pixels are let in, and this is planned for {most}: "
            "plan for more (--size), or lower limits.max_pixels"
        )
    if most.num_frames > 1 and admitted.max_num_frames > most.num_frames:
        yield (
            f"videos of up to {admitted.max_num_frames} frames are let in, and this is planned for "
            f"{most.num_frames}: plan for more (--size), or lower limits.max_num_frames"
        )


def _on_fragments(demands: Mapping[Stage, Demand], placement: Placement) -> Iterator[str]:
    """Ray chooses a node by the sum of what its GPUs have left: https://github.com/ray-project/ray/issues/39987"""
    for stage, demand in demands.items():
        if not 0 < demand.num_gpus < 1 or placement.num_replicas(stage) >= demand.max_replicas:
            continue
        for node in sorted({gpu.node for gpu in placement.gpus}):
            left = [placement.left(gpu) for gpu in placement.gpus if gpu.node == node]
            if max(left) < demand.num_gpus <= sum(left):
                yield (
                    f"for a further {stage}, {share(demand.num_gpus)}, Ray takes node {node}, whose GPUs have "
                    f"{sum(left):.2g} left in all and none has enough: it waits there, and no node is added; "
                    "ask for whole GPUs, or lower max_replicas"
                )


def _on_cuts(sizes: ModelSizes, times: Times) -> Iterator[str]:
    """The engine balances bytes; where times are known, they balance better."""
    ranks = sizes.denoise.ranks[:: sizes.denoise.ranks[0].degree]
    cuts = times.plan_cuts(len(ranks))
    if cuts is None:
        return
    now_s = max(times.rank_s(rank.blocks) for rank in ranks)
    best_s = max(times.rank_s([blocks] * len(times.denoisers)) for blocks in pairwise(cuts))
    if now_s / best_s > WORTH_TELLING:
        gain = now_s / best_s - 1
        yield f"by the measured times, cuts: {list(cuts[1:-1])} make the slowest shard {gain:.0%} faster"


def _used_gpus(placement: Placement) -> set[Gpu]:
    return {gpu for process in placement.processes for gpu in process.gpus}

"""Advice on a plan, one sentence each: against splitting what fits one GPU, sharding UNets, empty pipelines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.machines.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.families.parallel import CONTEXT_PARALLEL
from deployments.plan.place import Placement, StageDemand, blocked_by_order, gib, share
from deployments.plan.profile import Times
from deployments.plan.sizes import ModelSizes, RankSizes, largest

FEW_TENSOR_RANKS = 2
SMALL_PIXELS = 1024 * 1024
WORTH_TELLING = 1.03
"""Other cuts are advised only if the slowest shard is faster by more than this factor."""


@dataclass(frozen=True)
class Admitted:
    """The limits of requests that the app admits."""

    max_concurrent_requests: int
    max_pixels: int
    """Width times height."""
    max_num_frames: int


def advise(
    sizes: ModelSizes,
    transformer: TransformerConfig,
    stages: Sequence[StageConfig],
    demands: Mapping[Stage, StageDemand],
    placement: Placement,
    times: Times | None,
    admitted: Admitted,
) -> tuple[str, ...]:
    """Returns all advice. stages: the configs of all three stages."""
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
            f"two shards of denoise {replica} are on one GPU, which NCCL refuses: set transformer.num_gpus above "
            "0.5"
        )
    order = blocked_by_order(demands, placement.gpus, placement.beside) if placement.is_complete() else None
    if order is not None:
        found.append(
            f"if Ray happens to start {', then '.join(order)}, some process finds no GPU and waits forever: "
            "choose num_gpus so that those of all three stages sum to 1 at most, or give one its own GPU"
        )
    found += _on_fragments(demands, placement)
    for replica in placement.split_groups():
        found.append(f"the shards of denoise {replica} are on several nodes: every step crosses the network")
    idle = [str(gpu) for gpu in placement.gpus if not placement.on(gpu)]
    if idle:
        found.append(f"nothing is placed on {', '.join(idle)}: raise transformer.max_replicas or shards")
    return tuple(found)


def whole_bytes(sizes: ModelSizes) -> int:
    """Returns the bytes that one replica of all three stages needs on one GPU, with the denoisers as one shard."""
    others = [*sizes.encode.ranks, *sizes.decode.ranks]
    return sum(rank.weights_bytes + rank.beside_bytes for rank in others) + (_whole_rank(sizes).need_bytes)


def _whole_rank(sizes: ModelSizes) -> RankSizes:
    """Returns the sizes of a process that holds all denoisers whole."""
    weights = sum(of.weights_bytes for of in sizes.denoisers)
    ranks = sizes.denoise.ranks
    working, adapters = (max(of) for of in zip(*((r.working_bytes, r.adapter_bytes) for r in ranks), strict=True))
    return RankSizes(weights, weights, working, adapter_bytes=adapters)


def _on_splitting(sizes: ModelSizes, transformer: TransformerConfig, placement: Placement) -> Iterator[str]:
    largest = max((gpu.memory_bytes for gpu in placement.gpus), default=0)
    needed = whole_bytes(sizes)
    if needed > largest:
        return
    fits = f"all three stages fit on one GPU ({gib(needed)} of {gib(largest)})"
    if transformer.num_shards > 1:
        yield (
            f"{fits}: shards do not make a request faster; rather put a whole replica on each GPU (shards: 1)"
            + (", or use context_parallel, which does" if _all_share(sizes) else "")
        )
    elif placement.num_replicas("denoise") == 1 and len(_used_gpus(placement)) > 1:
        yield (
            f"{fits}: a GPU of their own for encoder and VAE changes a request's time by less than 1 % "
            "(published by vLLM-Omni); rather put a second replica of the transformer there"
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
        yield (
            f"{num_shards} shards and at most {at_once} requests at once: some shard always waits; use fewer "
            "shards"
        )
    elif at_once < 2 * num_shards:
        yield f"{num_shards} shards need {2 * num_shards} requests to stay busy; at most {at_once} are admitted"


def _on_sharing(sizes: ModelSizes, transformer: TransformerConfig, placement: Placement) -> Iterator[str]:
    """Yields advice on ranks that share each forward.

    They make one request faster; shards and replicas serve more requests.
    """
    degree, asked = transformer.parallel_degree, largest(sizes.sizes)
    if degree == 1:
        num_replicas = placement.num_replicas("denoise")
        if num_replicas > 1 and _all_share(sizes):
            yield (
                f"{num_replicas} replicas raise throughput; for latency use fewer, each with context_parallel "
                "ranks"
            )
        return
    gpu_bytes = max((gpu.memory_bytes for gpu in placement.gpus), default=0)
    if transformer.num_shards == 1 and _whole_rank(sizes).need_bytes <= gpu_bytes:
        yield (
            f"{degree} ranks share each forward although the whole denoiser fits one GPU: that is good for "
            f"latency; for throughput rather use {degree} replicas, which exchange nothing"
        )
        if transformer.tensor_parallel > 1 and _all_share(sizes):
            yield "context_parallel exchanges less than tensor_parallel, which is for weights too large for a GPU"
    if transformer.tensor_parallel > FEW_TENSOR_RANKS and asked.width * asked.height <= SMALL_PIXELS:
        yield (
            f"tensor_parallel {transformer.tensor_parallel} at {asked}: every block sums all of its tokens over "
            f"the ranks twice, and at this size more than {FEW_TENSOR_RANKS} ranks wait for that longer than they "
            f"compute; set tensor_parallel: {FEW_TENSOR_RANKS}, and use more shards"
        )
    for replica in placement.split_forwards():
        yield (
            f"ranks of denoise {replica} that share each forward are on several nodes: every block waits for the "
            "network; use fewer ranks, which fit one node"
        )


def _all_share(sizes: ModelSizes) -> bool:
    """Whether all denoisers support context_parallel."""
    names = {of.name for of in sizes.denoisers}
    return all(of.class_name in CONTEXT_PARALLEL for of in sizes.denoise.components if of.name in names)


def _on_limits(sizes: ModelSizes, admitted: Admitted) -> Iterator[str]:
    most = largest(sizes.sizes)
    if admitted.max_pixels > most.width * most.height:
        yield (
            f"requests of up to {admitted.max_pixels} pixels are admitted, but this plan is for {most}: "
            "plan for more (--size), or lower limits.max_pixels"
        )
    if most.num_frames > 1 and admitted.max_num_frames > most.num_frames:
        yield (
            f"videos of up to {admitted.max_num_frames} frames are admitted, but this plan is for "
            f"{most.num_frames}: plan for more (--size), or lower limits.max_num_frames"
        )


def _on_fragments(demands: Mapping[Stage, StageDemand], placement: Placement) -> Iterator[str]:
    """Yields advice if a further replica fits a node by the sum of its GPUs' free shares, but fits no single GPU.

    Ray chooses a node by that sum: https://github.com/ray-project/ray/issues/39987
    """
    for stage, demand in demands.items():
        has_all = demand.is_auto or placement.num_replicas(stage) >= demand.max_replicas
        if has_all or not 0 < demand.num_gpus < 1:
            continue
        for node in sorted({gpu.node for gpu in placement.gpus}):
            left = [placement.left(gpu) for gpu in placement.gpus if gpu.node == node]
            if max(left) < demand.num_gpus <= sum(left):
                yield (
                    f"Ray would place another {stage} replica ({share(demand.num_gpus)}) on node {node}, whose "
                    f"GPUs have {sum(left):.2g} left in all, but none has enough: it waits there, and no node is "
                    "added; ask for whole GPUs, or lower max_replicas"
                )


def _on_cuts(sizes: ModelSizes, times: Times) -> Iterator[str]:
    """Yields advice if cuts by measured times are faster than the planned ones, which balance bytes by default."""
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

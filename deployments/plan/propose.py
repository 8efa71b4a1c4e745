"""Proposes a config if only the model and the GPUs are given: the first that fits, the least costly tried first.

Everything is in bf16 at first, with as few shards as fit. If that does not fit, the text encoders are streamed
through the rest of a GPU, which changes no image; then the transformer is quantised to 8 and to 4 bits, which
changes images.
"""

import math
from dataclasses import replace
from itertools import product

from cluster.machines.inventory import Gpu
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.memory.config import QuantizationConfig, TilingConfig
from deployments.plan.place import GIB, blocked_by_order, plan_placement
from deployments.plan.plan import SizesOf, StageConfigs, demands_of
from deployments.plan.profile import Times
from deployments.plan.sizes import RankSizes

QUANTIZATIONS = (None, QuantizationConfig(kind="int8"), QuantizationConfig(kind="nf4"))
TILINGS = (None, TilingConfig(tile_size=512))
MORE_THAN_HALF = 0.51
"""Least num_gpus of a shard or replica: two on one GPU would halve each other's speed, and NCCL refuses that."""
_STEP_GIB = 0.5
"""Step of budgets for streamed weights, in GiB."""


class DoesNotFit(ValueError):
    """None of the tried configs fits the GPUs. The message says what the smallest one lacks."""


def propose(sizes_of: SizesOf, gpus: tuple[Gpu, ...], times: Times | None = None) -> StageConfigs:
    """Returns the first config that fits. Raises DoesNotFit."""
    memory = min(gpu.memory_bytes for gpu in gpus)
    sizes = sizes_of(_stages())
    most = 1 if sizes.is_unet or not sizes.num_blocks else min(len(gpus), sizes.num_blocks)
    stages = _stages()
    for quantization, is_streamed, shards in product(QUANTIZATIONS, (False, True), range(1, most + 1)):
        for tiling in TILINGS:
            stages = _shared(_stages(quantization, shards, tiling), sizes_of, memory)
            for budget in _budgets(stages, sizes_of, gpus, memory) if is_streamed else (None,):
                encoder = stages.encoder.model_copy(update={"vram_limit_gib": budget})
                stages = _shared(replace(stages, encoder=encoder), sizes_of, memory)
                if _fits(stages, sizes_of, gpus):
                    return _balanced(_filled(stages, sizes_of, gpus, memory), sizes_of, times)
    lacking = plan_placement(demands_of(stages, sizes_of(stages)), gpus).shortfalls()
    raise DoesNotFit(
        "it does not fit, not even in 4 bits, with streamed text encoders and a shard on each GPU: "
        + "; ".join(lacking)
    )


def _stages(
    quantization: QuantizationConfig | None = None, shards: int = 1, tiling: TilingConfig | None = None
) -> StageConfigs:
    """Returns configs with one replica of each stage; `_filled` adds replicas."""
    return StageConfigs(
        EncoderConfig(dtype="bfloat16", max_replicas=1),
        TransformerConfig(dtype="bfloat16", shards=shards, quantization=quantization, max_replicas=1),
        VaeConfig(dtype="bfloat16", tiling=tiling, max_replicas=1),
    )


def _shared(stages: StageConfigs, sizes_of: SizesOf, memory: int) -> StageConfigs:
    """Returns the configs with num_gpus that cover each process's need; at most 1, which may be too little."""
    sizes = sizes_of(stages)
    transformer = _share(sizes.denoise.ranks, memory)
    if stages.transformer.shards * stages.transformer.most_replicas > 1:
        transformer = max(transformer, MORE_THAN_HALF)
    return StageConfigs(
        stages.encoder.model_copy(update={"num_gpus": _share(sizes.encode.ranks, memory)}),
        stages.transformer.model_copy(update={"num_gpus": transformer}),
        stages.vae.model_copy(update={"num_gpus": _share(sizes.decode.ranks, memory)}),
    )


def _share(ranks: tuple[RankSizes, ...], memory: int) -> float:
    return min(1.0, math.ceil(1000 * max(rank.need_bytes for rank in ranks) / memory) / 1000)


def _budgets(stages: StageConfigs, sizes_of: SizesOf, gpus: tuple[Gpu, ...], memory: int) -> list[float]:
    """Returns budgets, in GiB, of the text encoders' weights on a GPU: the most room that transformer and VAE
    leave on any GPU, or the room that they leave together on one GPU."""
    demands = demands_of(stages, sizes_of(stages))
    [rank] = demands.pop("encode").ranks
    others = plan_placement(demands, gpus)
    rooms = [1 - sum(process.num_gpus for process in others.on(gpu)) for gpu in gpus]
    rooms = [max(rooms), 1 - stages.transformer.num_gpus - stages.vae.num_gpus]
    budgets = [(room * memory - rank.beside_bytes) / GIB for room in rooms]
    return [max(_STEP_GIB, math.floor(budget / _STEP_GIB) * _STEP_GIB) for budget in budgets]


def _filled(stages: StageConfigs, sizes_of: SizesOf, gpus: tuple[Gpu, ...], memory: int) -> StageConfigs:
    """Returns the configs with as many transformer replicas as fit, then as many shards.

    Replicas come first: they serve as many requests as shards do, and each request sooner.
    """
    shards = stages.transformer.shards
    for num_replicas in range(len(gpus) // shards, 0, -1):
        for more_shards in range(_most_shards(stages, sizes_of, len(gpus) // num_replicas), shards - 1, -1):
            counts = {"shards": more_shards, "min_replicas": num_replicas, "max_replicas": num_replicas}
            transformer = stages.transformer.model_copy(update=counts)
            filled = _shared(replace(stages, transformer=transformer), sizes_of, memory)
            if _fits(filled, sizes_of, gpus):
                return filled
    return stages


def _most_shards(stages: StageConfigs, sizes_of: SizesOf, num_gpus: int) -> int:
    sizes = sizes_of(stages)
    return 1 if sizes.is_unet or not sizes.num_blocks else min(num_gpus, sizes.num_blocks)


def _balanced(stages: StageConfigs, sizes_of: SizesOf, times: Times | None) -> StageConfigs:
    """Returns the configs with cuts by measured times, unless the fullest rank would need more memory."""
    shards = stages.transformer.shards
    if times is None or shards == 1:
        return stages
    cuts = times.plan_cuts(shards)
    if cuts is None:
        return stages
    cut = replace(stages, transformer=stages.transformer.model_copy(update={"cuts": cuts[1:-1]}))
    heaviest = max(rank.need_bytes for rank in sizes_of(cut).denoise.ranks)
    return cut if heaviest <= max(rank.need_bytes for rank in sizes_of(stages).denoise.ranks) else stages


def _fits(stages: StageConfigs, sizes_of: SizesOf, gpus: tuple[Gpu, ...]) -> bool:
    """Whether the configs fit, in whatever order Ray starts the stages."""
    demands = demands_of(stages, sizes_of(stages))
    return not plan_placement(demands, gpus).shortfalls() and blocked_by_order(demands, gpus) is None

"""A config where only the model and the GPUs are given: the first that fits, of those that cost the least.

Everything in bf16 first; then the text encoders streamed through what is left of a GPU, which changes no picture;
then the transformer in more shards; then in 8 and in 4 bits, which does.
"""

import math
from dataclasses import replace
from itertools import product

from cluster.inventory import Gpu
from cluster.partition import plan_cuts
from deployments.config import EncoderConfig, TransformerConfig, VaeConfig
from deployments.memory.config import QuantizationConfig, TilingConfig
from deployments.plan.place import GIB, Placement, place
from deployments.plan.plan import SizesOf, Stages, demands_of
from deployments.plan.profile import Times
from deployments.plan.sizes import OVERHEAD_BYTES, RankSizes

QUANTIZATIONS = (None, QuantizationConfig(kind="int8"), QuantizationConfig(kind="nf4"))
TILINGS = (None, TilingConfig(tile_size=512))
MORE_THAN_HALF = 0.51
"""The share of a transformer with replicas: two of them on one GPU would halve each other's speed."""
_STEP_GIB = 0.5
"""Of budgets for streamed weights."""


class DoesNotFit(ValueError):
    """None of these configs fits the GPUs; says what the smallest one lacks."""


def propose(sizes_of: SizesOf, gpus: tuple[Gpu, ...], times: Times | None = None) -> Stages:
    """Raises DoesNotFit."""
    memory = min(gpu.memory_bytes for gpu in gpus)
    plain = _stages()
    sizes = sizes_of(plain)
    most = 1 if sizes.is_unet or not sizes.blocks else min(len(gpus), len(sizes.blocks))
    choices = product(QUANTIZATIONS, (False, True), range(1, most + 1), TILINGS)
    stages = plain
    for quantization, is_streamed, shards, tiling in choices:
        stages = _shared(_stages(quantization, shards, tiling), sizes_of, memory)
        if is_streamed:
            stages = _streamed(stages, sizes_of, gpus, memory)
        if _fits(stages, sizes_of, gpus):
            return _balanced(_filled(stages, sizes_of, gpus, memory), sizes_of, times)
    lacking = _placed(stages, sizes_of, gpus).shortfalls()
    raise DoesNotFit(
        "does not fit, not even in 4 bits, with streamed text encoders and a shard on each GPU: "
        + "; ".join(lacking)
    )


def _stages(
    quantization: QuantizationConfig | None = None, shards: int = 1, tiling: TilingConfig | None = None
) -> Stages:
    return Stages(
        EncoderConfig(dtype="bfloat16"),
        TransformerConfig(dtype="bfloat16", shards=shards, quantization=quantization),
        VaeConfig(dtype="bfloat16", tiling=tiling),
    )


def _shared(stages: Stages, sizes_of: SizesOf, memory: int) -> Stages:
    """With shares that cover what each process needs; at most a whole GPU, which may be too little."""
    sizes = sizes_of(stages)

    def share(ranks: tuple[RankSizes, ...]) -> dict[str, float]:
        return {"num_gpus": min(1.0, math.ceil(100 * max(rank.need_bytes for rank in ranks) / memory) / 100)}

    return Stages(
        stages.encoder.model_copy(update=share(sizes.encode.ranks)),
        stages.transformer.model_copy(update=share(sizes.denoise.ranks)),
        stages.vae.model_copy(update=share(sizes.decode.ranks)),
    )


def _streamed(stages: Stages, sizes_of: SizesOf, gpus: tuple[Gpu, ...], memory: int) -> Stages:
    """With a budget for the text encoders' weights: what transformer and VAE leave of some GPU."""
    others = _placed(stages, sizes_of, gpus, without_encoder=True)
    room = max(1 - sum(process.num_gpus for process in others.on(gpu)) for gpu in gpus)
    [rank] = sizes_of(stages).encode.ranks
    left_gib = (room * memory - rank.working_bytes - OVERHEAD_BYTES) / GIB
    limit_gib = max(_STEP_GIB, math.floor(left_gib / _STEP_GIB) * _STEP_GIB)
    encoder = stages.encoder.model_copy(update={"vram_limit_gib": limit_gib})
    return _shared(replace(stages, encoder=encoder), sizes_of, memory)


def _filled(stages: Stages, sizes_of: SizesOf, gpus: tuple[Gpu, ...], memory: int) -> Stages:
    """As many replicas as the GPUs hold, then as many shards: replicas serve as much, and a request sooner."""
    shards = stages.transformer.shards
    for num_replicas in range(len(gpus) // shards, 0, -1):
        for more_shards in range(_most_shards(stages, sizes_of, len(gpus) // num_replicas), shards - 1, -1):
            transformer = stages.transformer.model_copy(update={"shards": more_shards})
            filled = _shared(replace(stages, transformer=transformer), sizes_of, memory)
            share = max(filled.transformer.num_gpus, MORE_THAN_HALF if num_replicas > 1 else 0.0)
            counts = {"min_replicas": num_replicas, "max_replicas": num_replicas, "num_gpus": share}
            filled = replace(filled, transformer=filled.transformer.model_copy(update=counts))
            if _fits(filled, sizes_of, gpus):
                return filled
    return stages


def _most_shards(stages: Stages, sizes_of: SizesOf, num_gpus: int) -> int:
    sizes = sizes_of(stages)
    return 1 if sizes.is_unet or not sizes.blocks else min(num_gpus, len(sizes.blocks))


def _balanced(stages: Stages, sizes_of: SizesOf, times: Times | None) -> Stages:
    """Cut by measured times, where the fullest rank still fits its share."""
    shards = stages.transformer.shards
    if times is None or shards == 1:
        return stages
    cuts = plan_cuts(times.blocks_s, shards, tail_cost=times.tail_s)[1:-1]
    cut = replace(stages, transformer=stages.transformer.model_copy(update={"cuts": cuts}))
    heaviest = max(rank.need_bytes for rank in sizes_of(cut).denoise.ranks)
    return cut if heaviest <= max(rank.need_bytes for rank in sizes_of(stages).denoise.ranks) else stages


def _fits(stages: Stages, sizes_of: SizesOf, gpus: tuple[Gpu, ...]) -> bool:
    return not _placed(stages, sizes_of, gpus).shortfalls()


def _placed(
    stages: Stages, sizes_of: SizesOf, gpus: tuple[Gpu, ...], *, without_encoder: bool = False
) -> Placement:
    demands = demands_of(stages, sizes_of(stages))
    if without_encoder:
        del demands["encode"]
    return place(demands, gpus)

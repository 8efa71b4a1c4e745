"""One rank's shards of a checkpoint's denoisers, ready to run."""

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils._pytree import tree_map_only

from cluster.parallel_group import ParallelGroup
from cluster.partition import plan_cuts
from deployments.checkpoints.components import ModelIndex, denoiser_names, fetch_stage
from deployments.checkpoints.weights import find_variants
from deployments.config import ModelConfig, TransformerConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.engine.adapters import AdapterLayers, Rows
from deployments.engine.blocks import BlockBytes, block_bytes, build_skeleton
from deployments.engine.cut import Boundary, Output
from deployments.engine.merge import Inputs
from deployments.engine.parallel import Parallel, sliced
from deployments.engine.shard import Shard, load_shard
from deployments.families.parallel import find_parallel_faults
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.quantize import plan_stage_quantization
from deployments.memory.share import take_share
from deployments.memory.spread import memory_by_device
from deployments.memory.stored import as_stored, stored_bytes, stored_models


@dataclass(frozen=True, eq=False)
class Denoisers:
    """A checkpoint's denoisers before their weights are read: what every rank knows alike."""

    folder: Path
    index: ModelIndex
    skeletons: Mapping[str, nn.Module]
    """The models on the meta device, by component name."""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """One rank's weights, and what keeps them."""

    shards: Mapping[str, Shard]
    """One of each denoiser, by component name."""
    keeper: Keeper
    adapters: AdapterLayers

    def run(
        self, component: str, inputs: Inputs, boundary: Boundary | None = None, rows: Sequence[Rows] = ()
    ) -> Boundary | tuple[Output, ...]:
        """`Shard.run` of that denoiser, once the weights are there. rows: adapters of the batch's samples.

        In inference mode where no technique touches the weights: torch need not watch what becomes of tensors, and
        a step of many small operations takes a tenth less. Its tensors may not be written in place outside of it,
        which those techniques do to weights, and schedulers may do to a prediction.
        """
        with self.keeper.at_work():
            with torch.inference_mode(self.keeper.is_untouched), self.adapters.applied(component, rows):
                output = self.shards[component].run(inputs, boundary)
            return output if isinstance(output, dict) else tree_map_only(torch.Tensor, _writable, output)


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def open_denoisers(model: ModelConfig, config: TransformerConfig) -> Denoisers:
    """Fetches the checkpoint if need be; reads configs only."""
    folder, index = fetch_stage(model, "denoise", config.dtype)
    skeletons = build_skeletons(folder, index)
    check_parallel(skeletons, config)
    return Denoisers(folder, index, skeletons, resolve_dtype(config.dtype), resolve_device(config))


def build_skeletons(folder: Path, index: ModelIndex) -> dict[str, nn.Module]:
    """The checkpoint's denoisers on the meta device, by component name. Not thread-safe."""
    classes = {name: getattr(diffusers, index[name][1]) for name in denoiser_names(index)}
    return {name: build_skeleton(model_class, folder, name) for name, model_class in classes.items()}


def check_parallel(skeletons: Mapping[str, Any], config: TransformerConfig) -> None:
    """Raises ValueError where ranks cannot share each forward as config says. skeletons: by component name."""
    degrees = config.context_parallel, config.tensor_parallel
    for model in skeletons.values():
        for fault in find_parallel_faults(type(model).__name__, model.config, *degrees):
            raise ValueError(fault)
        if config.tensor_parallel > 1 and getattr(model, "gguf_file", None) is not None:
            raise ValueError("transformer.tensor_parallel: weights of GGUF have no parts: use context_parallel")
        sliced(model, config.tensor_parallel)


def open_parallel(
    denoisers: Denoisers, config: TransformerConfig, rank: int, store: TCPStore | None
) -> tuple[ParallelGroup | None, Parallel | None]:
    """This rank among those that share its forwards: returns when they have met. None where it runs them alone.

    store: where all ranks of the replica meet.
    """
    degree = config.parallel_degree
    if degree == 1:
        return None, None
    if store is None:
        raise ValueError("ranks that share each forward meet before they load: load the stage with where")
    shard, own = divmod(rank, degree)
    device, limit_s = denoisers.device, config.stuck_limit_s
    group = ParallelGroup(own, degree, store, name=f"shard {shard}", device=device, stuck_after_s=limit_s)
    return group, Parallel(group, device, splits_weights=config.tensor_parallel > 1)


def load_rank(
    denoisers: Denoisers,
    model: ModelConfig,
    config: TransformerConfig,
    rank: int,
    parallel: Parallel | None = None,
) -> LoadedRank:
    """Reads the weights of this rank's blocks, and only those, and keeps them as config says."""
    shard = rank // config.parallel_degree
    quantized: Mapping[str, Any] = {}
    if config.quantization is not None:
        names = denoisers.skeletons
        quantized = plan_stage_quantization(config.quantization, config.dtype, denoisers.index, names)
    share = take_share(config, denoisers.device)
    with turn_to_load(config, denoisers.device), share.naming():
        shards = {}
        for name, skeleton in denoisers.skeletons.items():
            options = {"quantization_config": quantized[name]} if name in quantized else {}
            variants = find_variants(denoisers.folder / name, "diffusers")
            if config.device_map is not None:
                options |= _spread_options(name, denoisers, config)
                disk = tempfile.TemporaryDirectory(prefix="latent-relay-")  # for what fits nowhere
                options["offload_folder"] = disk.name
            shards[name] = load_shard(
                type(skeleton),
                denoisers.folder,
                name,
                blocks=plan_ranks(name, skeleton, config)[shard] if config.num_shards > 1 else None,
                dtype=denoisers.dtype,
                variant=model.variant if model.variant in variants else None,  # what was in a file has none
                parallel=parallel,
                **options,
            )
            if config.device_map is not None:
                weakref.finalize(shards[name].model, disk.cleanup)
        models = {name: shard.model for name, shard in shards.items()}
        keeper = Keeper(models, config, denoisers.device, config.device_map, share=share)
        foreign = {name: shards[name].foreign_names(skeleton) for name, skeleton in denoisers.skeletons.items()}
        adapters = AdapterLayers(models, denoisers.device, foreign=foreign, is_compiled=config.compile is not None)
        return LoadedRank(shards, keeper, adapters)


def _spread_options(name: str, denoisers: Denoisers, config: TransformerConfig) -> dict[str, Any]:
    """`from_pretrained`'s, of one denoiser: it may take of each device as large a part as it is of them all."""
    sizes = {other: stored_bytes(model) for other, model in stored_models(denoisers.skeletons, config).items()}
    part = sizes[name] / sum(sizes.values())
    return {"device_map": config.device_map, "max_memory": memory_by_device(config, part)}


def plan_ranks(name: str, skeleton: nn.Module, config: TransformerConfig) -> list[tuple[int, int]]:
    """The block range of every shard: as configured, else so that the largest has the fewest bytes."""
    stored = as_stored(skeleton, config, is_quantized=config.quantizes(name))
    return cut_ranks(block_bytes(sliced(stored, config.tensor_parallel)), config)


def cut_ranks(weights: BlockBytes, config: TransformerConfig) -> list[tuple[int, int]]:
    """`plan_ranks`, where it is known what the blocks weigh as stored."""
    num_blocks = len(weights.blocks)
    if config.cuts is not None:
        if config.cuts[-1] >= num_blocks:
            raise ValueError(f"cuts must be below {num_blocks}, the number of blocks, got {config.cuts[-1]}")
        return list(pairwise((0, *config.cuts, num_blocks)))
    return list(pairwise(plan_cuts(weights.blocks, config.shards, tail_cost=weights.tail)))

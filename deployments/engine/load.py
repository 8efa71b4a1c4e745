"""Loads one rank's shards of a checkpoint's denoisers."""

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

from cluster.ranks.parallel_group import ParallelGroup
from cluster.ranks.partition import plan_cuts
from deployments.checkpoints.components import ModelIndex, denoiser_names, fetch_stage
from deployments.checkpoints.weights import find_variants
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import AdapterLayers, Rows
from deployments.engine.blocks import BlockBytes, block_bytes, build_skeleton
from deployments.engine.cut import Boundary, Output
from deployments.engine.merge import Inputs
from deployments.engine.parallel import Parallel, sliced
from deployments.engine.shard import Shard, load_shard
from deployments.families.parallel import find_parallel_faults
from deployments.memory.device import resolve_device, resolve_dtype
from deployments.memory.quantize import plan_stage_quantization
from deployments.memory.residency import WeightResidency
from deployments.memory.share import take_share
from deployments.memory.spread import memory_by_device
from deployments.memory.stored import as_stored, stored_bytes, stored_models
from deployments.memory.time_sharing import lease_to_load


@dataclass(frozen=True, eq=False)
class Denoisers:
    """A checkpoint's denoisers before their weights are read; the same on every rank."""

    folder: Path
    index: ModelIndex
    skeletons: Mapping[str, nn.Module]
    """The models on the meta device, by component name."""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """One rank's weights and their residency."""

    shards: Mapping[str, Shard]
    """One shard of each denoiser, by component name."""
    residency: WeightResidency
    adapters: AdapterLayers

    def run(
        self, component: str, inputs: Inputs, boundary: Boundary | None = None, rows: Sequence[Rows] = ()
    ) -> Boundary | tuple[Output, ...]:
        """Calls `Shard.run` of a denoiser with its weights on the device. rows: adapters of the batch's samples.

        Uses inference mode if no technique touches the weights: torch then does not track tensors, and a step of
        many small operations takes a tenth less time. Tensors made in inference mode must not be written in place
        outside of it. Those techniques do that to weights; schedulers may do it to predictions, which are cloned.
        """
        with self.residency.on_device():
            with torch.inference_mode(self.residency.is_untouched), self.adapters.applied(component, rows):
                output = self.shards[component].run(inputs, boundary)
            return output if isinstance(output, dict) else tree_map_only(torch.Tensor, _writable, output)


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def open_denoisers(model: ModelConfig, config: TransformerConfig) -> Denoisers:
    """Fetches the checkpoint if necessary; reads only its configs."""
    folder, index = fetch_stage(model, "denoise", config.dtype)
    skeletons = build_skeletons(folder, index)
    check_parallel(skeletons, config)
    return Denoisers(folder, index, skeletons, resolve_dtype(config.dtype), resolve_device(config))


def build_skeletons(folder: Path, index: ModelIndex) -> dict[str, nn.Module]:
    """Returns the checkpoint's denoisers on the meta device, by component name. Not thread-safe."""
    classes = {name: getattr(diffusers, index[name][1]) for name in denoiser_names(index)}
    return {name: build_skeleton(model_class, folder, name) for name, model_class in classes.items()}


def check_parallel(skeletons: Mapping[str, Any], config: TransformerConfig) -> None:
    """Raises ValueError if ranks cannot share each forward as config says. skeletons: by component name."""
    degrees = config.context_parallel, config.tensor_parallel
    for model in skeletons.values():
        for fault in find_parallel_faults(type(model).__name__, model.config, *degrees):
            raise ValueError(fault)
        if config.tensor_parallel > 1 and getattr(model, "gguf_file", None) is not None:
            raise ValueError("transformer.tensor_parallel: GGUF weights cannot be split: use context_parallel")
        sliced(model, config.tensor_parallel)


def open_parallel(
    denoisers: Denoisers, config: TransformerConfig, rank: int, store: TCPStore | None
) -> tuple[ParallelGroup | None, Parallel | None]:
    """Connects this rank with those that share its forwards; returns when all have connected.

    Returns (None, None) if this rank runs its forwards alone. store: where all ranks of the replica meet.
    """
    degree = config.parallel_degree
    if degree == 1:
        return None, None
    if store is None:
        raise ValueError("ranks that share each forward must meet before they load: pass `where`")
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
    """Reads only the weights of this rank's blocks, and keeps them as config says."""
    shard = rank // config.parallel_degree
    quantized: Mapping[str, Any] = {}
    if config.quantization is not None:
        names = denoisers.skeletons
        quantized = plan_stage_quantization(config.quantization, config.dtype, denoisers.index, names)
    share = take_share(config, denoisers.device)
    with lease_to_load(config, denoisers.device), share.translating_oom():
        shards = {}
        for name, skeleton in denoisers.skeletons.items():
            options = {"quantization_config": quantized[name]} if name in quantized else {}
            variants = find_variants(denoisers.folder / name, "diffusers")
            if config.device_map is not None:
                options |= _spread_options(name, denoisers, config)
                disk = tempfile.TemporaryDirectory(prefix="latent-relay-")  # for weights that fit on no device
                options["offload_folder"] = disk.name
            shards[name] = load_shard(
                type(skeleton),
                denoisers.folder,
                name,
                blocks=plan_shard_blocks(name, skeleton, config)[shard] if config.num_shards > 1 else None,
                dtype=denoisers.dtype,
                variant=model.variant if model.variant in variants else None,  # a single file has no variant
                parallel=parallel,
                **options,
            )
            if config.device_map is not None:
                weakref.finalize(shards[name].model, disk.cleanup)
        models = {name: shard.model for name, shard in shards.items()}
        residency = WeightResidency(models, config, denoisers.device, config.device_map, share=share)
        foreign = {name: shards[name].foreign_names(skeleton) for name, skeleton in denoisers.skeletons.items()}
        adapters = AdapterLayers(models, denoisers.device, foreign=foreign, is_compiled=config.compile is not None)
        return LoadedRank(shards, residency, adapters)


def _spread_options(name: str, denoisers: Denoisers, config: TransformerConfig) -> dict[str, Any]:
    """Returns `from_pretrained`'s options for one denoiser: each device is divided between denoisers by size."""
    sizes = {other: stored_bytes(model) for other, model in stored_models(denoisers.skeletons, config).items()}
    part = sizes[name] / sum(sizes.values())
    return {"device_map": config.device_map, "max_memory": memory_by_device(config, part)}


def plan_shard_blocks(name: str, skeleton: nn.Module, config: TransformerConfig) -> list[tuple[int, int]]:
    """Returns the block range of every shard: as configured, else so that the largest has the fewest bytes."""
    stored = as_stored(skeleton, config, is_quantized=config.quantizes(name))
    return cut_blocks(block_bytes(sliced(stored, config.tensor_parallel)), config)


def cut_blocks(weights: BlockBytes, config: TransformerConfig) -> list[tuple[int, int]]:
    """Like `plan_shard_blocks`, from the bytes of the blocks as stored. Raises ValueError for impossible cuts."""
    num_blocks = len(weights.blocks)
    if config.cuts is not None:
        if config.cuts[-1] >= num_blocks:
            raise ValueError(f"cuts must be below {num_blocks}, the number of blocks, got {config.cuts[-1]}")
        return list(pairwise((0, *config.cuts, num_blocks)))
    return list(pairwise(plan_cuts(weights.blocks, config.shards, tail_cost=weights.tail)))

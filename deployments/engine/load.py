"""One rank's shard of a checkpoint's denoiser, ready to run."""

import tempfile
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cluster.partition import plan_cuts
from deployments.checkpoints.components import ModelIndex, fetch_stage
from deployments.checkpoints.weights import find_variants
from deployments.config import ModelConfig, TransformerConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.engine.blocks import BlockBytes, block_bytes, block_names, build_skeleton
from deployments.engine.cut import Boundary, Output
from deployments.engine.merge import Inputs
from deployments.engine.shard import Shard, load_shard
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.quantize import plan_quantization
from deployments.memory.share import take_share
from deployments.memory.spread import memory_by_device
from deployments.memory.stored import as_stored


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A checkpoint's denoiser before its weights are read: what every rank knows alike."""

    folder: Path
    index: ModelIndex
    name: str
    """The component's name: transformer or unet."""
    model_class: Any
    skeleton: nn.Module
    """The model on the meta device."""
    dtype: torch.dtype
    device: torch.device

    @property
    def block_names(self) -> tuple[str, ...]:
        """In forward order; none where the class declares none, which then runs as one shard."""
        try:
            return block_names(self.skeleton)
        except ValueError:
            return ()

    @property
    def config(self) -> Any:
        """The model's config, as pipelines read it."""
        return self.skeleton.config


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """One rank's weights, and what keeps them."""

    shard: Shard
    keeper: Keeper

    def run(self, inputs: Inputs, boundary: Boundary | None = None) -> Boundary | tuple[Output, ...]:
        """`Shard.run`, once the weights are there.

        In inference mode where no technique touches the weights: torch need not watch what becomes of tensors, and
        a step of many small operations takes a tenth less. Its tensors may not be written in place outside of it,
        which those techniques do to weights, and schedulers may do to a prediction.
        """
        with self.keeper.at_work():
            with torch.inference_mode(self.keeper.is_untouched):
                output = self.shard.run(inputs, boundary)
            return output if isinstance(output, dict) else tree_map_only(torch.Tensor, _writable, output)


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def open_denoiser(model: ModelConfig, config: TransformerConfig) -> Denoiser:
    """Fetches the checkpoint if need be; reads configs only."""
    folder, index = fetch_stage(model, "denoise", config.dtype)
    name = model.architecture.denoiser
    model_class = getattr(diffusers, index[name][1])
    skeleton = build_skeleton(model_class, folder, name)
    return Denoiser(
        folder, index, name, model_class, skeleton, resolve_dtype(config.dtype), resolve_device(config)
    )


def load_rank(denoiser: Denoiser, model: ModelConfig, config: TransformerConfig, rank: int) -> LoadedRank:
    """Reads the weights of this rank's blocks, and only those, and keeps them as config says."""
    options: dict[str, Any] = {}
    if config.quantization is not None:
        options["quantization_config"] = plan_quantization(config.quantization, config.dtype, "diffusers")
    if config.device_map is not None:
        disk = tempfile.TemporaryDirectory(prefix="latent-relay-")  # for what fits nowhere
        options |= {
            "device_map": config.device_map,
            "max_memory": memory_by_device(config),
            "offload_folder": disk.name,
        }
    variants = find_variants(denoiser.folder / denoiser.name, "diffusers")
    share = take_share(config, denoiser.device)
    with turn_to_load(config, denoiser.device), share.naming():
        shard = load_shard(
            denoiser.model_class,
            denoiser.folder,
            denoiser.name,
            blocks=plan_ranks(denoiser, config)[rank] if config.num_ranks > 1 else None,
            dtype=denoiser.dtype,
            variant=model.variant if model.variant in variants else None,  # what was in a file has none
            **options,
        )
        if config.device_map is not None:
            weakref.finalize(shard.model, disk.cleanup)
        models = {denoiser.name: shard.model}
        keeper = Keeper(models, config, denoiser.device, config.device_map, share=share)
        return LoadedRank(shard, keeper)


def plan_ranks(denoiser: Denoiser, config: TransformerConfig) -> list[tuple[int, int]]:
    """The block range of every rank: as configured, else so that the largest shard has the fewest bytes."""
    return cut_ranks(block_bytes(as_stored(denoiser.skeleton, config)), config)


def cut_ranks(weights: BlockBytes, config: TransformerConfig) -> list[tuple[int, int]]:
    """`plan_ranks`, where it is known what the blocks weigh as stored."""
    num_blocks = len(weights.blocks)
    if config.cuts is not None:
        if config.cuts[-1] >= num_blocks:
            raise ValueError(f"cuts must be below {num_blocks}, the number of blocks, got {config.cuts[-1]}")
        return list(pairwise((0, *config.cuts, num_blocks)))
    return list(pairwise(plan_cuts(weights.blocks, config.shards, tail_cost=weights.tail)))

"""Ranks that share each forward, by diffusers' own context and tensor parallelism.

Context parallel: each rank has all weights and its part of the sequence; for attention, ranks exchange parts of
the sequence for heads (Ulysses, https://arxiv.org/abs/2309.14509). Tensor parallel: each rank has its part of
every large matrix, and the whole sequence (https://arxiv.org/abs/1909.08053). `_cp_plan` and `_tp_plan` of a model
class say what is split and where; this module narrows them to the blocks of one shard.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.hooks import context_parallel, tensor_parallel
from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig, gather_size_by_comm
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_map_only

from cluster.ranks.parallel_group import ParallelGroup

dist: Any = torch.distributed

_UNEVEN = "divisible by mesh size"
"""Text of the error that diffusers raises for an uneven sequence, before any rank waits for another."""


def _gather_uneven(part: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Gathers parts of unequal lengths, padded to the longest: diffusers' own does not pad, but gloo needs it."""
    lengths = gather_size_by_comm(part.shape[dim], group)
    padding = [0, 0] * (part.ndim - dim - 1) + [0, max(lengths) - part.shape[dim]]
    padded = nn.functional.pad(part, padding).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([one.narrow(dim, 0, length) for one, length in zip(parts, lengths, strict=True)], dim)


context_parallel._all_gather_anything = _gather_uneven
# diffusers lists only devices it has tested; gloo also works on CPU.
tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu", *tensor_parallel._SUPPORTED_TP_DEVICES)


class Parallel:
    """How the ranks of one group share the forwards of a model."""

    def __init__(self, group: ParallelGroup, device: torch.device, *, splits_weights: bool) -> None:
        """All ranks of the group must call this at the same time.

        splits_weights: True: tensor parallel; False: context parallel.
        """
        self._splits_weights = splits_weights
        if splits_weights:
            mesh = group.mesh("tp")
            self.config = ParallelConfig(tensor_parallel_config=TensorParallelConfig(mesh=mesh))
        else:
            mesh = group.mesh("ring", "ulysses")
            ulysses = ContextParallelConfig(ulysses_degree=group.size, mesh=mesh)
            self.config = ParallelConfig(context_parallel_config=ulysses)
        self.config.setup(group.rank, group.size, device, mesh=mesh)

    def run(self, forward: Callable[[], Any]) -> Any:
        """Runs one forward, and waits until the tensors in its output have arrived from the other ranks."""
        return tree_map_only(AsyncCollectiveTensor, AsyncCollectiveTensor.wait, self._run(forward))

    def _run(self, forward: Callable[[], Any]) -> Any:
        """Tries equal parts of the sequence first: unequal ones cost an exchange of lengths at every attention."""
        try:
            return forward()
        except AssertionError as error:
            if self._splits_weights or _UNEVEN not in str(error):
                raise
        ulysses: Any = self.config.context_parallel_config
        ulysses.ulysses_anything = True
        try:
            return forward()
        finally:
            ulysses.ulysses_anything = False

    def narrowed(self, model_class: Any, skeleton: nn.Module, foreign: Collection[str]) -> type[ModelMixin]:
        """Returns a subclass whose plans name only this shard's modules. It has the name of the model class.

        foreign: names of the modules of `skeleton` that other shards hold.
        """
        plans = {"_cp_plan": model_class._cp_plan, "_tp_plan": model_class._tp_plan}
        own: dict[str, Any] = {name: _expand(plan or {}, skeleton, foreign) for name, plan in plans.items()}
        return type(model_class.__name__, (model_class,), {**own, "_resolve_parallel_config": _as_given})


def sliced(stored: nn.Module, degree: int) -> nn.Module:
    """Returns a model from `as_stored` as each of `degree` tensor parallel ranks holds it.

    Raises ValueError if its weights cannot be split so.
    """
    if degree == 1:
        return stored
    part = copy.deepcopy(stored)
    plan: Any = part._tp_plan
    for name, spec in tensor_parallel.resolve_tp_shard_specs(part, plan, degree).items():
        if spec.dim is not None:
            module_name, _, parameter_name = name.rpartition(".")
            module = part.get_submodule(module_name)
            whole = getattr(module, parameter_name)
            own = whole.narrow(spec.dim, 0, whole.shape[spec.dim] // degree)
            setattr(module, parameter_name, nn.Parameter(own, requires_grad=False))
    return part


def working_share(peak_bytes: int, context_parallel: int) -> int:
    """Returns a rank's share of the working memory of a whole forward: its part of the sequence, plus 1/8 for
    tensors that are whole while they are embedded or gathered. Tensor parallel ranks take at most all of it."""
    if context_parallel == 1:
        return peak_bytes
    return peak_bytes // context_parallel + peak_bytes // 8


def _as_given(model: Any, config: ParallelConfig) -> ParallelConfig:
    """Keeps the config as given: diffusers would require an accelerator and use this process's first one."""
    model._parallel_config = config
    return config


def _expand(plan: Mapping[str, Any], skeleton: nn.Module, foreign: Collection[str]) -> dict[str, Any]:
    """Returns plan entries by the name of a module that this shard holds.

    Entries that match one module, such as those of `blocks.0` and `blocks.*`, are joined.
    """
    found: dict[str, Any] = {}
    for name, _ in skeleton.named_modules():
        if any(name == other or name.startswith(f"{other}.") for other in foreign):
            continue
        entries = [entry for pattern, entry in plan.items() if _matches(name, pattern)]
        if len(entries) > 1:
            found[name] = {key: value for entry in entries for key, value in entry.items()}
        elif entries:
            found[name] = entries[0]
    return found


def _matches(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)

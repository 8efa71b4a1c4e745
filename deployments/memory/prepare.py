"""Applies a stage's memory techniques to its loaded models, in the one order that works.

    quantise (while loading) → attention backend → channels_last → cast → place → compile or trace

Casting hooks must be there before offloading hooks, which move what is stored; compiling comes last, so that
graphs see the final modules.
"""

import resource
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import accelerate
import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.utils._pytree import tree_map_only

from cluster.turn import Turn
from deployments.config import StageConfig
from deployments.device import resolve_dtype
from deployments.memory.casting import cast_layers
from deployments.memory.config import (
    CompileConfig,
    LayerwiseCastingConfig,
    OffloadConfig,
    QuantizationConfig,
)
from deployments.memory.conflicts import find_conflict
from deployments.memory.mapped import check_mapped, mapped_bytes
from deployments.memory.movable import make_movable
from deployments.memory.needs import Needs
from deployments.memory.on_demand import Guest, give_back, open_guest, open_turn
from deployments.memory.share import Share
from deployments.memory.trace import TracedForward
from deployments.memory.vram_limit import VramLimit
from deployments.stats import MemoryStats

RECOMPILE_LIMIT = 1000
"""Of graphs per function, for one object and for all: every hook, block kind and size may need one."""


class Keeper:
    """Keeps the models of one stage as its config says."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        config: StageConfig,
        device: torch.device,
        device_map: str | None = None,
        own: Sequence[str] = (),
        share: Share | None = None,
    ) -> None:
        """
        Args:
            device_map: how accelerate has placed them already, if it has.
            own: techniques that the stage has applied itself, such as tiling.
            share: of the device, as this process has taken it; None: it has not.

        Raises ValueError where a technique does not suit a model or the device; names both.
        """
        self._models, self._config, self._device = models, config, device
        self._share = share or Share()
        self.needs = Needs(self._share.limit, device)
        self._leaving: list[Any] = []
        self._budgets: list[VramLimit] = []
        self._turn: Turn | None = None
        self._is_pinned = config.host_copy == "memory"
        self._applied: list[str] = []
        for name, model in models.items():
            model.eval()
            _check_stored(name, model, config)
        if config.quantization is not None:
            self._applied.append(f"quantization: {config.quantization.kind}")
        self._applied += own
        self._set_kernels()
        if config.layerwise_casting is not None:
            self._cast(config.layerwise_casting)
        if config.host_copy == "files":
            self._check_mapped()
        if device_map is None:
            self._place()
            give_back(device)  # quantised weights may have been there and gone
        else:
            self._applied.append(f"device_map: {device_map}")
        if config.compile is not None:
            self._compile(config.compile)
        if config.trace:
            self._trace()

    @property
    def applied(self) -> tuple[str, ...]:
        """The techniques, in the order they were applied."""
        return tuple(self._applied)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around every use of the models: with `on_demand` it waits for the turn, and the weights are there.

        Raises OutOfShare.
        """
        turn = nullcontext() if self._turn is None else self._turn.work()
        # Named again before the turn ends: an error's frames hold tensors, which must not outlast it.
        with self._share.naming(), turn, self._share.naming():
            yield

    def release(self) -> None:
        """The stage is idle: what came to the device for its work leaves it; with `on_demand`, if anyone asks."""
        if self._turn is not None:
            self._turn.rest()
        for hook in self._leaving:
            hook.offload()
        if self._leaving:
            give_back(self._device)

    def stats(self) -> MemoryStats:
        """Of this process, which holds nothing but these models."""
        turns = None if self._turn is None else self._turn.stats()
        is_away = turns is not None and not turns.is_here
        mapped = sum(mapped_bytes(model.parameters()) for model in self._models.values())
        weights: Counter[str] = Counter()
        for model in self._models.values():
            for tensor in model.state_dict(keep_vars=True).values():
                place = "offloaded" if tensor.is_meta or is_away else tensor.device
                weights[f"{place} {str(tensor.dtype).removeprefix('torch.')}"] += tensor.nbytes
        limits = tuple(budget.stats() for budget in self._budgets)
        return MemoryStats(
            dict(weights),
            self.applied,
            mapped,
            *self._peaks(),
            limits,
            turns,
            None if self._share.limit is None else self._share.limit.num_bytes,
            self.needs.stats(),
        )

    def _peaks(self) -> tuple[int, int]:
        """(allocated, reserved)"""
        if self._device.type == "cuda":
            return self.needs.peaks()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak

    def _set_kernels(self) -> None:
        backend, is_channels_last = self._config.attention_backend, self._config.channels_last
        for name, model in self._models.items():
            if backend is not None:
                _set_attention_backend(name, model, backend)
            if is_channels_last:
                _set_channels_last(name, model)
        if backend is not None:
            self._applied.append(f"attention_backend: {backend}")
        if is_channels_last:
            self._applied.append("channels_last")

    def _cast(self, config: LayerwiseCastingConfig) -> None:
        for model in self._models.values():
            cast_layers(model, config, resolve_dtype(self._config.dtype))
        self._applied.append(f"layerwise_casting: {config.storage_dtype}")

    def _check_mapped(self) -> None:
        for name, model in self._models.items():
            check_mapped(name, model, self._config.dtype)
        self._applied.append("host_copy: files")

    def _place(self) -> None:
        if self._config.vram_limit_gib is not None:
            self._limit(self._config.vram_limit_gib * 2**30)
        elif self._config.offload is not None:
            self._offload(self._config.offload)
        elif self._config.on_demand is None:
            for model in self._models.values():
                if not getattr(model, "is_loaded_in_8bit", False):  # those are where they belong
                    model.to(self._device)
            self._applied.append(f"device: {self._device.type}")
        if self._config.on_demand is not None:
            guests: list[Guest] = [*self._budgets]
            guests = guests or [
                open_guest(model, self._device, is_pinned=self._is_pinned) for model in self._models.values()
            ]
            self._turn = open_turn(self._config, self._device, guests)
            self._applied.append("on_demand")

    def _limit(self, limit_bytes: float) -> None:
        """One budget for the stage, shared out by size."""
        sizes = {name: sum(p.nbytes for p in model.parameters()) for name, model in self._models.items()}
        for name, model in self._models.items():
            share = int(limit_bytes * sizes[name] / sum(sizes.values()))
            self._budgets.append(
                VramLimit(model, limit_bytes=share, device=self._device, is_pinned=self._is_pinned)
            )
        self._applied.append(f"vram_limit_gib: {self._config.vram_limit_gib:g}")

    def _offload(self, config: OffloadConfig) -> None:
        if config.use_stream and self._device.type == "cpu":
            raise ValueError("offload.use_stream needs a GPU, and this stage runs on the CPU: leave it out")
        previous = None
        for model in self._models.values():
            if config.kind == "model":
                make_movable(model)
                _, previous = accelerate.cpu_offload_with_hook(model, self._device, previous)
                self._leaving.append(previous)
            elif config.kind == "sequential":
                accelerate.cpu_offload(model, self._device, offload_buffers=True)
            elif config.kind == "disk":
                accelerate.disk_offload(model, _folder(model, config.folder), self._device, offload_buffers=True)
            else:
                apply_group_offloading(
                    model,
                    onload_device=self._device,
                    offload_type=f"{config.level}_level",
                    num_blocks_per_group=config.blocks_per_group if config.level == "block" else None,
                    non_blocking=config.non_blocking,
                    use_stream=config.use_stream,
                    record_stream=config.record_stream,
                    low_cpu_mem_usage=config.low_cpu_memory,
                    offload_to_disk_path=config.folder and _folder(model, config.folder),
                    block_modules=_vae_blocks(model),
                )
        self._applied.append(f"offload: {config.kind}")

    def _compile(self, config: CompileConfig) -> None:
        options = {
            "mode": None if config.mode == "default" else config.mode,
            "fullgraph": config.fullgraph,
            "dynamic": config.dynamic,
            "backend": config.backend,
        }
        for model in self._models.values():
            # A VAE is not called by its forward, but by its decode.
            parts = repeated_blocks(model) if config.scope == "blocks" else [getattr(model, "decoder", model)]
            for part in parts:
                part.compile(**options)
                call = _in_any_thread(part._compiled_call_impl)
                part._compiled_call_impl = copied(call) if config.has_graphs else call
        self._applied.append(f"compile: {config.scope}")

    def _trace(self) -> None:
        for name, model in self._models.items():
            if not type(model).__name__.startswith("UNet"):
                raise ValueError(
                    f"trace is for UNets, and {name} is a {type(model).__name__}: use compile: blocks"
                )
            model.requires_grad_(False)  # only here: torch then chooses other kernels for some convolutions
            model.forward = TracedForward(model)
        self._applied.append("trace")


def _check_stored(name: str, model: nn.Module, config: StageConfig) -> None:
    """Raises ValueError if a checkpoint is stored quantised and config asks for what does not go with that."""
    for kind, mark in (("nf4", "is_loaded_in_4bit"), ("int8", "is_loaded_in_8bit")):
        if getattr(model, mark, False) and config.quantization is None:
            stored = QuantizationConfig.model_validate({"kind": kind})
            conflict = find_conflict(config.model_copy(update={"quantization": stored}))
            if conflict is not None:
                raise ValueError(f"{name} is stored quantised, and {conflict}")


def _in_any_thread(compiled: Any) -> Any:
    """dynamo's settings are each thread's own, and it compiles in the thread that calls.

    What quantised and offloaded models need: https://huggingface.co/docs/diffusers/optimization/speed-memory-optims
    """
    settings = torch._dynamo.config

    def call(*args: Any, **kwargs: Any) -> Any:
        if settings.recompile_limit != RECOMPILE_LIMIT:
            settings.recompile_limit = settings.accumulated_recompile_limit = RECOMPILE_LIMIT
            settings.capture_dynamic_output_shape_ops = True
        return compiled(*args, **kwargs)

    return call


def copied(compiled: Any) -> Any:
    """A CUDA graph gives the same tensors at every call, and the next call may come before they are read."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))

    return call


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """What `compile_repeated_blocks` would compile, where the class says; else entries of its outermost lists."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    blocks = []
    for child in model.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return [block for block in blocks if any(True for _ in block.parameters())]  # a shard's stubs have none


def _vae_blocks(model: nn.Module) -> list[str] | None:
    """Of a VAE whose class does not say: hooks elsewhere would wait for its forward, which nobody calls."""
    if not hasattr(model, "decoder") or hasattr(model, "_group_offload_block_modules"):
        return None
    return [name for name in ("quant_conv", "post_quant_conv", "encoder", "decoder") if hasattr(model, name)]


def _set_attention_backend(name: str, model: Any, backend: str) -> None:
    if not isinstance(model, ModelMixin):
        raise ValueError(f"attention_backend is for diffusers' models, and {name} is a {type(model).__name__}")
    try:
        model.set_attention_backend(backend)
    except RuntimeError as error:  # names the missing package
        raise ValueError(f"attention_backend {backend!r} cannot run here: {error}") from error
    processors = [getattr(module, "processor", None) for module in model.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"attention_backend: {type(model).__name__} always uses torch's native attention: leave it out"
        )


def _set_channels_last(name: str, model: nn.Module) -> None:
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    found = [
        (module, to) for kind, to in formats.items() for module in model.modules() if isinstance(module, kind)
    ]
    if not found:
        raise ValueError(f"channels_last is for convolutions, and {name} ({type(model).__name__}) has none")
    for convolution, memory_format in found:
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=memory_format)


def _folder(model: nn.Module, parent: str | None) -> str:
    """A folder of the model's own, gone with it: group offloading would take files it finds for its own."""
    folder = tempfile.TemporaryDirectory(prefix="latent-relay-", dir=parent)
    weakref.finalize(model, folder.cleanup)
    return folder.name

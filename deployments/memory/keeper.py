"""Keeps a stage's models as its config says: applies its memory techniques, in the one order that works.

    quantise (while loading) → attention backend → channels_last → cast → place → compile or trace

Casting hooks must be there before offloading hooks, which move what is stored; compiling comes last, so that
graphs see the final modules.
"""

import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from cluster import accelerator
from cluster.turn import Turn
from deployments.config import StageConfig
from deployments.device import resolve_dtype
from deployments.memory.casting import cast_layers
from deployments.memory.compile import compile_model
from deployments.memory.config import QuantizationConfig
from deployments.memory.conflicts import find_conflict
from deployments.memory.kernels import set_attention_backend, set_channels_last
from deployments.memory.mapped import check_mapped, mapped_bytes
from deployments.memory.needs import Needs
from deployments.memory.offload import offload
from deployments.memory.on_demand import Guest, open_guest, open_turn
from deployments.memory.share import Share
from deployments.memory.trace import trace_unet
from deployments.memory.vram_limit import VramLimit
from deployments.stats import MemoryStats


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
        self.has_device_map = device_map is not None
        """Whether accelerate has placed the weights, over several devices."""
        self._share = share or Share()
        self.needs = Needs(self._share.limit, device)
        self._staying: list[Any] = []
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
        self._fit()
        if device_map is None:
            self._place()
            accelerator.empty_cache(device)  # quantised weights may have been there and gone
        else:
            self._applied.append(f"device_map: {device_map}")
        self._capture()
        self._quantized = {name: _weigh(model) for name, model in models.items() if _is_quantized(model)}

    @property
    def applied(self) -> tuple[str, ...]:
        """The techniques, in the order they were applied."""
        return tuple(self._applied)

    @property
    def is_untouched(self) -> bool:
        """Nothing moves, casts, traces or compiles the weights, and they are not quantised, nor stored so."""
        config = self._config
        if config.moves_weights or config.trace or self.has_device_map:
            return False
        if config.layerwise_casting is not None or config.compile is not None:
            return False
        return not any(map(_is_quantized, self._models.values()))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around every use of the models: with `on_demand` it waits for the turn, and the weights are there.

        Raises OutOfShare.
        """
        turn = nullcontext() if self._turn is None else self._turn.work()
        # Named again before the turn ends: an error's frames hold tensors, which must not outlast it.
        with self._share.naming(), turn, self._share.naming():
            yield

    def naming(self) -> AbstractContextManager[None]:
        """Around what else is at work on the device: raises OutOfShare where there is no room for it."""
        return self._share.naming()

    def release(self) -> None:
        """The stage is idle: what came to the device for its work leaves it; with `on_demand`, if anyone asks."""
        if self._turn is not None:
            self._turn.rest()
        for hook in self._staying:
            hook.offload()
        if self._staying:
            accelerator.empty_cache(self._device)

    def is_device_lost(self) -> bool:
        """Whether nothing on it will ever work again in this process. Does not wait."""
        return accelerator.is_lost(self._device)

    def stats(self) -> MemoryStats:
        """Of this process, which holds nothing but these models."""
        turns = None if self._turn is None else self._turn.stats()
        is_away = turns is not None and not turns.is_here
        mapped = sum(mapped_bytes(model.parameters()) for model in self._models.values())
        weights: Counter[str] = Counter()
        for name, model in self._models.items():
            for (place, dtype), num_bytes in self._weights(name, model).items():
                weights[f"{'offloaded' if is_away or place == 'meta' else place} {dtype}"] += num_bytes
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

    def _weights(self, name: str, model: nn.Module) -> Counter[tuple[str, str]]:
        """Bytes by (device, dtype). Quantised layers are weighed once: they move whole, and asking them for their
        scales waits for the GPU."""
        if name not in self._quantized:
            return _weigh(model)
        place = str(next(model.parameters()).device)
        return Counter({(place, dtype): size for (_, dtype), size in self._quantized[name].items()})

    def _peaks(self) -> tuple[int, int]:
        """(allocated, reserved)"""
        if accelerator.is_accelerator(self._device):
            return self.needs.peaks()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak

    def _fit(self) -> None:
        """Before any hook that moves what is stored: in which layout and dtype it is, and what computes."""
        config = self._config
        backend, casting, dtype = config.attention_backend, config.layerwise_casting, config.dtype
        if backend is not None:
            self._apply(f"attention_backend: {backend}", partial(set_attention_backend, backend=backend))
        if config.channels_last:
            self._apply("channels_last", set_channels_last)
        if casting is not None:
            cast = partial(cast_layers, config=casting, compute_dtype=resolve_dtype(dtype))
            self._apply(f"layerwise_casting: {casting.storage_dtype}", lambda _, model: cast(model))
        if config.host_copy == "files":
            self._apply("host_copy: files", partial(check_mapped, dtype=dtype))

    def _place(self) -> None:
        if self._config.vram_limit_gib is not None:
            self._limit(self._config.vram_limit_gib * 2**30)
        elif self._config.offload is not None:
            self._staying = offload(self._models.values(), self._config.offload, self._device)
            self._applied.append(f"offload: {self._config.offload.kind}")
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

    def _capture(self) -> None:
        """Last: graphs see the final modules."""
        compiling = self._config.compile
        if compiling is not None:
            self._apply(f"compile: {compiling.scope}", lambda _, model: compile_model(model, compiling))
        if self._config.trace:
            self._apply("trace", trace_unet)

    def _apply(self, technique: str, apply: Callable[[str, nn.Module], None]) -> None:
        """To every model, by its name."""
        for name, model in self._models.items():
            apply(name, model)
        self._applied.append(technique)


def _is_quantized(model: nn.Module) -> bool:
    """By config, or as it is stored."""
    return getattr(model, "hf_quantizer", None) is not None


def _weigh(model: nn.Module) -> Counter[tuple[str, str]]:
    """Bytes of all that a checkpoint of it would hold, by (device, dtype)."""
    found: Counter[tuple[str, str]] = Counter()
    for tensor in model.state_dict(keep_vars=True).values():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # tensor parallel: its part
        found[str(own.device), str(own.dtype).removeprefix("torch.")] += own.nbytes
    return found


def _check_stored(name: str, model: nn.Module, config: StageConfig) -> None:
    """Raises ValueError if a checkpoint is stored quantised and config asks for what does not go with that."""
    if config.quantization is not None or not _is_quantized(model):
        return
    kind = "int8" if getattr(model, "is_loaded_in_8bit", False) else "nf4"
    stored = QuantizationConfig.model_validate({"kind": kind})
    conflict = find_conflict(config.model_copy(update={"quantization": stored}))
    if conflict is not None:
        raise ValueError(f"{name} is stored quantised, and {conflict}")

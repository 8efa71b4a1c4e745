"""Places a stage's weights: applies the memory techniques of its config, in the only order that works.

    quantise (while loading) → attention backend → channels_last → cast → place → compile or trace

Casting hooks must be added before offloading hooks, which move weights as stored; compiling comes last, so that
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

from cluster.machines import accelerator
from cluster.machines.device_lease import DeviceLease
from deployments.config.stage import StageConfig
from deployments.memory.admission import MemoryAdmission
from deployments.memory.casting import cast_layers
from deployments.memory.compile import compile_model
from deployments.memory.config import QuantizationConfig
from deployments.memory.conflicts import find_conflict
from deployments.memory.device import resolve_dtype
from deployments.memory.kernels import set_attention_backend, set_channels_last
from deployments.memory.mapped import check_mapped, mapped_bytes
from deployments.memory.offload import offload
from deployments.memory.share import Share
from deployments.memory.stats import MemoryStats
from deployments.memory.time_sharing import SwappableWeights, open_lease, open_swappable
from deployments.memory.trace import trace_unet
from deployments.memory.vram_limit import VramLimit


class WeightResidency:
    """The weights of one stage's models: where they are, in which dtype, and when they are on the device."""

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
            device_map: the setting by which accelerate has placed the models already; None: it has not.
            own: techniques that the stage has applied itself, such as tiling.
            share: this process's share of the device; None: it has not taken one.

        Raises ValueError, which names both, if a technique does not suit a model or the device.
        """
        self._models, self._config, self._device = models, config, device
        self.has_device_map = device_map is not None
        """Whether accelerate has spread the weights over several devices."""
        self._share = share or Share()
        self.admission = MemoryAdmission(self._share.limit, device)
        self._staying: list[Any] = []
        self._budgets: list[VramLimit] = []
        self._lease: DeviceLease | None = None
        self._is_pinned = config.host_copy == "memory"
        self._applied: list[str] = []
        for name, model in models.items():
            model.eval()
            _check_stored(name, model, config)
        if config.quantization is not None:
            self._applied.append(f"quantization: {config.quantization.kind}")
        self._applied += own
        self._prepare()
        if device_map is None:
            self._place()
            accelerator.empty_cache(device)  # quantising may have left unused memory there
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
        """Whether no technique moves, casts, traces, compiles or quantises the weights, nor are they stored so."""
        config = self._config
        if config.moves_weights or config.trace or self.has_device_map:
            return False
        if config.layerwise_casting is not None or config.compile is not None:
            return False
        return not any(map(_is_quantized, self._models.values()))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context around every use of the models: with `time_sharing` it waits for the lease and the weights.

        Raises OutOfDeviceMemory.
        """
        lease = nullcontext() if self._lease is None else self._lease.held()
        # The inner translation is needed before the lease ends: an error's frames hold tensors, which it frees.
        with self._share.translating_oom(), lease, self._share.translating_oom():
            yield

    def translating_oom(self) -> AbstractContextManager[None]:
        """Context around other work on the device: raises OutOfDeviceMemory if memory does not suffice for it."""
        return self._share.translating_oom()

    def release(self) -> None:
        """Unloads what came to the device for the stage's work; call it when the stage is idle.

        With `time_sharing`, weights leave only once another process waits for the lease.
        """
        if self._lease is not None:
            self._lease.idle()
        for hook in self._staying:
            hook.offload()
        if self._staying:
            accelerator.empty_cache(self._device)

    def is_device_lost(self) -> bool:
        """Whether this process can no longer use the device at all. Does not block."""
        return accelerator.is_lost(self._device)

    def stats(self) -> MemoryStats:
        """Returns the statistics of this process, which holds only these models."""
        lease = None if self._lease is None else self._lease.stats()
        is_away = lease is not None and not lease.is_held
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
            lease,
            None if self._share.limit is None else self._share.limit.num_bytes,
            self.admission.stats(),
        )

    def _weights(self, name: str, model: nn.Module) -> Counter[tuple[str, str]]:
        """Returns bytes by (device, dtype). A quantised model is weighed once: it moves as a whole, and reading
        its layers' scales waits for the GPU."""
        if name not in self._quantized:
            return _weigh(model)
        place = str(next(model.parameters()).device)
        return Counter({(place, dtype): size for (_, dtype), size in self._quantized[name].items()})

    def _peaks(self) -> tuple[int, int]:
        """Returns the peak bytes (allocated, reserved)."""
        if accelerator.is_accelerator(self._device):
            return self.admission.peaks()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak

    def _prepare(self) -> None:
        """Sets kernels, memory layout and stored dtype, before any hook is added that moves weights."""
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
        elif self._config.time_sharing is None:
            for model in self._models.values():
                if not getattr(model, "is_loaded_in_8bit", False):  # loaded to the device already
                    model.to(self._device)
            self._applied.append(f"device: {self._device.type}")
        if self._config.time_sharing is not None:
            swappable: list[SwappableWeights] = [*self._budgets]
            swappable = swappable or [
                open_swappable(model, self._device, is_pinned=self._is_pinned) for model in self._models.values()
            ]
            self._lease = open_lease(self._config, self._device, swappable)
            self._applied.append("time_sharing")

    def _limit(self, limit_bytes: float) -> None:
        """Divides the stage's budget among its models in proportion to their sizes."""
        sizes = {name: sum(p.nbytes for p in model.parameters()) for name, model in self._models.items()}
        for name, model in self._models.items():
            share = int(limit_bytes * sizes[name] / sum(sizes.values()))
            self._budgets.append(
                VramLimit(model, limit_bytes=share, device=self._device, is_pinned=self._is_pinned)
            )
        self._applied.append(f"vram_limit_gib: {self._config.vram_limit_gib:g}")

    def _capture(self) -> None:
        """Compiles or traces the models; comes last, so that graphs see the final modules."""
        compiling = self._config.compile
        if compiling is not None:
            self._apply(f"compile: {compiling.scope}", lambda _, model: compile_model(model, compiling))
        if self._config.trace:
            self._apply("trace", trace_unet)

    def _apply(self, technique: str, apply: Callable[[str, nn.Module], None]) -> None:
        """Applies a technique to every model. apply: takes the model's name and the model."""
        for name, model in self._models.items():
            apply(name, model)
        self._applied.append(technique)


def _is_quantized(model: nn.Module) -> bool:
    """Whether a model is quantised, by config or because it is stored so."""
    return getattr(model, "hf_quantizer", None) is not None


def _weigh(model: nn.Module) -> Counter[tuple[str, str]]:
    """Returns the bytes of the model's state dict, by (device, dtype)."""
    found: Counter[tuple[str, str]] = Counter()
    for tensor in model.state_dict(keep_vars=True).values():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # tensor parallel: this rank's part
        found[str(own.device), str(own.dtype).removeprefix("torch.")] += own.nbytes
    return found


def _check_stored(name: str, model: nn.Module, config: StageConfig) -> None:
    """Raises ValueError if the model is stored quantised and config sets a technique that conflicts with that."""
    if config.quantization is not None or not _is_quantized(model):
        return
    kind = "int8" if getattr(model, "is_loaded_in_8bit", False) else "nf4"
    stored = QuantizationConfig.model_validate({"kind": kind})
    conflict = find_conflict(config.model_copy(update={"quantization": stored}))
    if conflict is not None:
        raise ValueError(f"{name} is stored quantised, and {conflict}")

"""Reads LoRA adapters with diffusers' own loaders, and keeps those that requests use.

The pipeline's `load_lora_weights` runs on models without weights. So all layouts that it supports can be read, and
PEFT's layers show which tensors belong to which layer. Only these tensors are kept; the models that serve stay
unchanged.
"""

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import nn

from deployments.checkpoints.adapter_file import fetch_adapter
from deployments.checkpoints.components import ModelIndex, component_names
from deployments.checkpoints.packages import import_class
from deployments.checkpoints.weights import read_header
from deployments.engine.adapters import NO_ADAPTERS, AdapterLayers, AdapterWeights, Applied, LowRank
from deployments.engine.blocks import build_skeleton
from deployments.errors import CannotServe, WrongField, describe_cause
from deployments.options.adapter import Adapter, ScaledAdapter

log = logging.getLogger("ray.serve")

PEFT_NAME = "adapter"
"""PEFT's name for each adapter while it is read."""

_READING = threading.Lock()
"""Held while reading, because PEFT and accelerate patch `nn.Module` while they build layers without weights."""

AskRanks = Callable[..., Sequence[Any]]
"""(method, arguments) -> the answers of the other ranks."""


def no_ranks(_method: str, *_: Any) -> Sequence[Any]:
    """Default `ask_ranks`: this process holds all layers."""
    return ()


class AdapterReader:
    """Reads adapters for one checkpoint."""

    def __init__(self, pipe: Any, folder: Path, index: ModelIndex, dtype: torch.dtype) -> None:
        """
        Args:
            pipe: a pipeline of the checkpoint's class, with any components.
            dtype: dtype of the weights that are read.

        Raises CannotServe if diffusers has no loader for such a pipeline.
        """
        if not hasattr(pipe, "load_lora_weights"):
            raise CannotServe(
                f"model.adapters: diffusers cannot load adapters into {type(pipe).__name__}: leave them out"
            )
        self._pipe, self._folder, self._index, self._dtype = pipe, folder, index, dtype
        self._skeletons: dict[str, nn.Module] = {}

    def read(self, adapter: Adapter) -> AdapterWeights:
        """Reads the adapter's weights for all components. Raises WrongField: unreadable, or for another model."""
        with _READING:
            return self._read(adapter)

    def _read(self, adapter: Adapter) -> AdapterWeights:
        pipe = copy.copy(self._pipe)
        hollow = {name: _hollow(self._skeleton(name), self._dtype) for name in self._component_names()}
        # No serving model may be in the pipeline, because the loader would remove the hooks that offload it.
        others = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        vars(pipe).update(dict.fromkeys(others) | hollow)
        load, options = pipe.load_lora_weights, {"adapter_name": PEFT_NAME, "low_cpu_mem_usage": True}
        try:
            file = fetch_adapter(adapter.source, revision=adapter.revision, weight_name=adapter.weight_name)
            load(str(file), **options)
            if adapter.source_2 is not None:
                load(str(fetch_adapter(adapter.source_2)), **options, load_into_transformer_2=True)
        except Exception as error:  # converters may raise anything for unknown layouts
            raise WrongField(
                f"adapter {adapter.name!r} cannot be read: {describe_cause(error)}", "lora"
            ) from error
        weights = {name: dict(self._layers(adapter, name, model)) for name, model in hollow.items()}
        if not any(weights.values()):
            raise WrongField(
                f"adapter {adapter.name!r} has nothing for any layer of {type(self._pipe).__name__}: it was made "
                f"for another model, or diffusers does not know its layout ({min(read_header(file))}, …)",
                "lora",
            )
        return {name: layers for name, layers in weights.items() if layers}

    def _component_names(self) -> list[str]:
        known: Sequence[str] = self._pipe._lora_loadable_modules
        return [name for name in known if name in component_names(self._index) and self._index[name][0]]

    def _skeleton(self, name: str) -> nn.Module:
        if name not in self._skeletons:
            library, class_name = self._index[name]
            if library == "diffusers":
                built = build_skeleton(getattr(diffusers, class_name), self._folder, name)
            else:
                model_class: Any = import_class(self._index[name])
                config = model_class.config_class.from_pretrained(self._folder / name)
                with torch.device("meta"):
                    built = model_class(config)
            self._skeletons[name] = built
        return self._skeletons[name]

    def _layers(self, adapter: Adapter, component: str, model: nn.Module) -> Iterator[tuple[str, LowRank]]:
        layers: Iterator[tuple[str, Any]] = model.named_modules()
        for name, layer in layers:
            if not hasattr(layer, "base_layer"):  # PEFT's wrappers all have one
                continue
            where = f"adapter {adapter.name!r}, {component}.{name}"
            if PEFT_NAME not in getattr(layer, "lora_A", ()):
                raise WrongField(f"{where} is a {type(layer).__name__}: only LoRA's terms are served", "lora")
            down, up = layer.lora_A[PEFT_NAME], layer.lora_B[PEFT_NAME]
            here = (down.weight.shape[1], up.weight.shape[0])
            own: Any = self._skeleton(component).get_submodule(name)
            there = tuple(own.weight.shape[1::-1])
            if here != there:
                raise WrongField(
                    f"{where} maps {here[0]} to {here[1]}, and the model's {there[0]} to {there[1]}", "lora"
                )
            if not all(bool(weight.isfinite().all()) for weight in (down.weight, up.weight)):
                raise WrongField(f"{where} has values that are NaN or infinite as {self._dtype}", "lora")
            bias = None if up.bias is None else up.bias.detach()
            yield name, LowRank(down.weight.detach(), up.weight.detach(), bias, layer.scaling[PEFT_NAME])


def _hollow(skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a copy whose tensors take no memory, on the CPU, where PEFT then puts the adapter's tensors too."""
    model = copy.deepcopy(skeleton)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_zeros(parameter, dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _zeros(buffer, buffer.dtype)
    return model


def _zeros(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((), dtype=dtype).expand(like.shape)


@dataclass(eq=False)
class _Entry:
    slot: int
    num_bytes: int
    is_here: bool
    """Whether the adapter has anything for this stage's models."""
    num_users: int = 0


class AdapterStore:
    """The adapters that a stage's requests use, or have used; an LRU cache. Thread-safe."""

    def __init__(
        self, reader: AdapterReader, layers: AdapterLayers, components: Sequence[str], max_bytes: int
    ) -> None:
        """
        Args:
            layers: the adapters' layers in this process.
            components: components of the stage, whichever ranks have their layers.
            max_bytes: limit on each rank; adapters in use are kept beyond it.
        """
        self._reader, self._layers, self._components = reader, layers, frozenset(components)
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Adapter, _Entry] = OrderedDict()
        self._loading: set[Adapter] = set()
        self._changed = threading.Condition()
        self._slots = count()
        self.ask_ranks: AskRanks = no_ranks
        """Calls `load_adapter` or `unload_adapter` on the other ranks; `layers` does the same in this process."""
        self.num_loads = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters on the rank that holds most."""
        return sum(entry.num_bytes for entry in list(self._entries.values()))

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return [adapter.name for adapter in list(self._entries)]

    @contextmanager
    def using(self, adapters: Sequence[ScaledAdapter]) -> Iterator[Applied]:
        """Keeps adapters loaded during a request, on all ranks; yields slots and scales. Blocks while they load.

        Raises WrongField if one cannot be read.
        """
        held: list[_Entry] = []
        try:
            held.extend(self._take(each.adapter) for each in adapters)
            yield _applied(held, adapters)
        finally:
            with self._changed:
                for entry in held:
                    entry.num_users -= 1
            self._evict()

    def recall(self, adapters: Sequence[ScaledAdapter]) -> Applied | None:
        """Returns what `using` would yield if all adapters are loaded, else None. Does not keep them loaded."""
        entries = [self._entries.get(each.adapter) for each in adapters]
        if None in entries:
            return None
        return _applied(cast("list[_Entry]", entries), adapters)

    def _take(self, adapter: Adapter) -> _Entry:
        with self._changed:
            while adapter in self._loading:
                self._changed.wait()
            if adapter in self._entries:
                self._entries.move_to_end(adapter)
                self._entries[adapter].num_users += 1
                return self._entries[adapter]
            self._loading.add(adapter)
        try:
            entry = self._load(adapter)
            with self._changed:
                self._entries[adapter] = entry
            return entry
        finally:
            with self._changed:
                self._loading.discard(adapter)
                self._changed.notify_all()

    def _load(self, adapter: Adapter) -> _Entry:
        weights = self._reader.read(adapter)
        slot = next(self._slots)
        is_here = not self._components.isdisjoint(weights)
        entry = _Entry(slot, 0, is_here, num_users=1)
        if is_here:
            try:
                sizes = [self._layers.load(slot, weights), *self.ask_ranks("load_adapter", slot, weights)]
            except BaseException:
                self._unload(entry)
                raise
            entry.num_bytes = max(sizes)
        self.num_loads += 1
        log.info("adapter %s: %d bytes on a rank", adapter.name, entry.num_bytes)
        return entry

    def _evict(self) -> None:
        with self._changed:
            left: list[_Entry] = []
            for adapter, entry in list(self._entries.items()):
                if self.num_bytes <= self._max_bytes:
                    break
                if entry.num_users == 0 and entry.num_bytes:
                    left.append(self._entries.pop(adapter))
        for entry in left:
            self._unload(entry)

    def _unload(self, entry: _Entry) -> None:
        self._layers.unload(entry.slot)
        self.ask_ranks("unload_adapter", entry.slot)


def _applied(entries: Sequence[_Entry], adapters: Sequence[ScaledAdapter]) -> Applied:
    """Returns slots and scales of the adapters that have weights for this stage."""
    return tuple((entry.slot, each.scale) for entry, each in zip(entries, adapters, strict=True) if entry.is_here)


def using_adapters(
    store: AdapterStore | None, adapters: Sequence[ScaledAdapter]
) -> AbstractContextManager[Applied]:
    """Calls `store.using`; without adapters, or for a stage that takes none, yields NO_ADAPTERS."""
    return nullcontext(NO_ADAPTERS) if store is None or not adapters else store.using(adapters)


def recall_adapters(store: AdapterStore | None, adapters: Sequence[ScaledAdapter]) -> Applied | None:
    """Calls `store.recall`; without adapters, or for a stage that takes none, returns NO_ADAPTERS."""
    return NO_ADAPTERS if store is None or not adapters else store.recall(adapters)

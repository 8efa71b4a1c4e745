"""LoRA adapters over one set of weights: each sample of a forward has its own low-rank terms.

    layer(x) + Σ scale · ratio · up(down(x))        https://arxiv.org/abs/2106.09685

Layers keep their weights as they are, stored however config says; while a forward with adapters runs, hooks add
the terms of its samples. So requests with different adapters, several or none fly as one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

_CONVOLUTIONS: Mapping[int, Callable[..., torch.Tensor]] = {
    3: nn.functional.conv1d,
    4: nn.functional.conv2d,
    5: nn.functional.conv3d,
}
"""By the dimensions of their weights."""

Applied = tuple[tuple[int, float], ...]
"""(slot, scale) of each adapter of a request."""
NO_ADAPTERS: Applied = ()


class Rows(NamedTuple):
    """Consecutive samples of a forward that have the same adapters."""

    num_samples: int
    adapters: Applied


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one layer."""

    down: torch.Tensor
    """[rank, in]; of a convolution [rank, in, *kernel]."""
    up: torch.Tensor
    """[out, rank]; of a convolution [out, rank, 1, …]."""
    bias: torch.Tensor | None
    ratio: float
    """alpha / rank."""

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def to(self, device: torch.device) -> "LowRank":
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, down=self.down.to(device), up=self.up.to(device), bias=bias)

    def term(self, layer: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        """What it adds to layer(x)."""
        if self.down.ndim == 2:
            hidden = nn.functional.linear(x.to(self.down.dtype), self.down)
            return nn.functional.linear(hidden, self.up, self.bias) * (self.ratio * scale)
        convolve = _CONVOLUTIONS[self.down.ndim]
        hidden = convolve(
            x.to(self.down.dtype), self.down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        )
        return convolve(hidden, self.up, self.bias) * (self.ratio * scale)


AdapterWeights = Mapping[str, Mapping[str, LowRank]]
"""By component, and by the layer's name in it."""


class AdapterLayers:
    """The adapters in this process, of the layers that it has. One thread runs forwards; another loads."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        device: torch.device,
        *,
        foreign: Mapping[str, Sequence[str]] = MappingProxyType({}),
        is_compiled: bool = False,
    ) -> None:
        """
        Args:
            models: by component name.
            foreign: by component name, modules whose weights other ranks have.
            is_compiled: whether parts of them are: graphs know no adapters, so forwards with some run eager.
        """
        self._models, self._foreign, self._device = models, foreign, device
        self._is_compiled = is_compiled
        self._weights: dict[int, dict[str, dict[str, LowRank]]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(map(self._bytes_of, list(self._weights)))

    def load(self, slot: int, weights: AdapterWeights) -> int:
        """Bytes of what is kept of it here: the layers of this process."""
        self._weights[slot] = {
            component: {
                name: layer.to(self._device)
                for name, layer in layers.items()
                if not _is_within(name, self._foreign.get(component, ()))
            }
            for component, layers in weights.items()
            if component in self._models
        }
        return self._bytes_of(slot)

    def unload(self, slot: int) -> None:
        """No forward that names it is left."""
        self._weights.pop(slot, None)

    def _bytes_of(self, slot: int) -> int:
        return sum(layer.nbytes for layers in self._weights[slot].values() for layer in layers.values())

    @contextmanager
    def applied(self, component: str, rows: Sequence[Rows]) -> Iterator[None]:
        """Around one forward of that model, of so many samples."""
        spans = _spans(rows)
        if not spans:
            yield
            return
        model, hooks = self._models[component], []
        num_samples = sum(each.num_samples for each in rows)
        for name, terms in self._terms(component, spans).items():
            hooks.append(model.get_submodule(name).register_forward_hook(_adding(name, terms, num_samples)))
        try:
            # imports dynamo: not for nothing
            with torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _terms(self, component: str, spans: Sequence["_Span"]) -> "dict[str, list[_Term]]":
        """By the layer's name. A slot may be empty again where its request was cancelled."""
        terms: dict[str, list[_Term]] = {}
        for start, end, adapters in spans:
            for slot, scale in adapters:
                for name, layer in self._weights.get(slot, {}).get(component, {}).items():
                    terms.setdefault(name, []).append(_Term(start, end, layer, scale))
        return terms


class _Span(NamedTuple):
    start: int
    end: int
    adapters: Applied


class _Term(NamedTuple):
    """Of samples `start:end`."""

    start: int
    end: int
    layer: LowRank
    scale: float


def _spans(rows: Sequence[Rows]) -> list[_Span]:
    """Neighbours with the same adapters are one."""
    spans: list[_Span] = []
    end = 0
    for num_samples, adapters in rows:
        start, end = end, end + num_samples
        if spans and spans[-1].end == start and spans[-1].adapters == adapters:
            spans[-1] = spans[-1]._replace(end=end)
        elif adapters:
            spans.append(_Span(start, end, adapters))
    return spans


def _adding(name: str, terms: Sequence[_Term], num_samples: int) -> Callable[..., torch.Tensor]:
    """A forward hook."""

    def add(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        for start, end, low_rank, scale in terms:
            here = low_rank if low_rank.down.device == x.device else low_rank.to(x.device)
            if (start, end) == (0, num_samples):
                output += here.term(layer, x, scale).to(output.dtype)
                continue
            if len(x) % num_samples:
                raise RuntimeError(
                    f"{name} runs on {len(x)} rows for {num_samples} samples with different adapters: they cannot "
                    "be told apart"
                )
            each = len(x) // num_samples  # a video's frames may lie in the batch, sample after sample
            own = slice(start * each, end * each)
            output[own] += here.term(layer, x[own], scale).to(output.dtype)
        return output

    return add


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)

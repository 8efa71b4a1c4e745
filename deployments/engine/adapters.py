"""LoRA adapters over one set of weights: each sample of a forward has its own low-rank terms.

    layer(x) + Σ scale · ratio · up(down(x))        https://arxiv.org/abs/2106.09685

Layers keep their weights unchanged, stored as config says. While a forward with adapters runs, hooks add the terms
of its samples. So requests with different adapters, several or none can be merged into one forward.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
"""Convolutions by the number of dimensions of their weights."""

Applied = tuple[tuple[int, float], ...]
"""(slot, scale) of each adapter of a request."""
NO_ADAPTERS: Applied = ()
_MAX_KEPT = 64
"""Most batch compositions whose hooks are kept."""


class Rows(NamedTuple):
    """Consecutive samples of a forward that have the same adapters."""

    num_samples: int
    adapters: Applied


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter's low-rank weights for one layer."""

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
        if self.down.device == device:
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, down=self.down.to(device), up=self.up.to(device), bias=bias)

    def term(self, layer: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns what the adapter adds to layer(x)."""
        if self.down.ndim == 2:
            hidden = nn.functional.linear(x.to(self.down.dtype), self.down)
            return nn.functional.linear(hidden, self.up, self.bias) * (self.ratio * scale)
        convolve = _CONVOLUTIONS[self.down.ndim]
        hidden = convolve(
            x.to(self.down.dtype), self.down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        )
        return convolve(hidden, self.up, self.bias) * (self.ratio * scale)


AdapterWeights = Mapping[str, Mapping[str, LowRank]]
"""Low-rank weights by component and layer name."""


class AdapterLayers:
    """The adapters in this process, for the layers that it has. One thread runs forwards; another loads."""

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
            models: models by component name.
            foreign: by component name, modules whose weights other ranks have.
            is_compiled: whether parts of the models are compiled. Compiled graphs do not include adapters, so
                forwards with adapters run eagerly.
        """
        self._models, self._foreign, self._device = models, foreign, device
        self._is_compiled = is_compiled
        self._weights: dict[int, dict[str, dict[str, LowRank]]] = {}
        self._hooks: dict[Hashable, dict[str, _Added]] = {}
        """Hooks by component and rows. They are kept because many forwards in a row have the same composition."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters in this process. Any thread may read it while another loads or unloads."""
        return sum(map(_num_bytes, list(self._weights.values())))

    def load(self, slot: int, weights: AdapterWeights) -> int:
        """Loads the adapter's weights for the layers of this process; returns their bytes."""
        self._hooks = {}
        self._weights[slot] = {
            component: {
                name: layer.to(self._device)
                for name, layer in layers.items()
                if not _is_within(name, self._foreign.get(component, ()))
            }
            for component, layers in weights.items()
            if component in self._models
        }
        return _num_bytes(self._weights[slot])

    def unload(self, slot: int) -> None:
        """Unloads an adapter. To be called when no forward that names the slot is left."""
        self._weights.pop(slot, None)
        self._hooks = {}

    @contextmanager
    def applied(self, component: str, rows: Sequence[Rows]) -> Iterator[None]:
        """Applies adapters to the samples during one forward of the model."""
        hooks = self._added(component, tuple(rows))
        if not hooks:
            yield
            return
        model = self._models[component]
        handles = [_hook(model.get_submodule(name), hook) for name, hook in hooks.items()]
        try:
            # set_stance imports dynamo, so it is called only if needed
            with torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _added(self, component: str, rows: tuple[Rows, ...]) -> "dict[str, _Added]":
        """Returns hooks by layer name. A slot may already be unloaded if its request was cancelled."""
        kept = self._hooks
        if (component, rows) not in kept:
            terms: dict[str, list[_Term]] = {}
            for start, end, adapters in _spans(rows):
                for slot, scale in adapters:
                    for name, layer in self._weights.get(slot, {}).get(component, {}).items():
                        terms.setdefault(name, []).append(_Term(start, end, layer, scale))
            num_samples = sum(each.num_samples for each in rows)
            if len(kept) >= _MAX_KEPT:
                kept.clear()
            kept[component, rows] = {name: _Added(name, of, num_samples) for name, of in terms.items()}
        return kept[component, rows]


class _Span(NamedTuple):
    start: int
    end: int
    adapters: Applied


class _Term(NamedTuple):
    """What an adapter adds to samples `start:end` in one layer."""

    start: int
    end: int
    layer: LowRank
    scale: float


def _spans(rows: Sequence[Rows]) -> list[_Span]:
    """Joins neighbouring rows with the same adapters; leaves out rows without adapters."""
    spans: list[_Span] = []
    end = 0
    for num_samples, adapters in rows:
        start, end = end, end + num_samples
        if spans and spans[-1].end == start and spans[-1].adapters == adapters:
            spans[-1] = spans[-1]._replace(end=end)
        elif adapters:
            spans.append(_Span(start, end, adapters))
    return spans


class _Added:
    """A forward hook of one layer that adds the adapters' terms for a batch of num_samples samples."""

    def __init__(self, name: str, terms: Sequence[_Term], num_samples: int) -> None:
        self._name, self._terms, self._num_samples = name, terms, num_samples
        self._is_for_all = all((term.start, term.end) == (0, num_samples) for term in terms)
        self._is_linear = all(term.layer.down.ndim == 2 and term.layer.bias is None for term in terms)
        self._of_sample = [[term for term in terms if term.start <= i < term.end] for i in range(num_samples)]

    def __call__(self, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, num = args[0], self._num_samples
        if self._is_for_all:
            for _, _, low_rank, scale in self._terms:
                output += low_rank.to(x.device).term(layer, x, scale).to(output.dtype)
            return output
        if len(x) % num:
            raise RuntimeError(
                f"{self._name} runs on {len(x)} rows for {num} samples with different adapters: they cannot be "
                "told apart"
            )
        if self._is_linear:
            output += self._linear(x).to(output.dtype)
            return output
        each = len(x) // num  # a video's frames may be in the batch dimension, sample after sample
        for start, end, low_rank, scale in self._terms:
            own = slice(start * each, end * each)
            output[own] += low_rank.to(x.device).term(layer, x[own], scale).to(output.dtype)
        return output

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what is added to a linear layer's whole output, [B, …, out], by two products over all samples.

        The common case is one adapter for each sample, all of one rank. Otherwise lower ranks get zero padding.
        """
        first, of_sample = self._terms[0].layer, self._of_sample
        ranks = [sum(len(term.layer.down) for term in own) for own in of_sample]
        rows = x.to(first.down.dtype).reshape(self._num_samples, -1, x.shape[-1])
        if len(set(ranks)) == 1 and all(len(own) == 1 for own in of_sample):
            down = torch.stack([own[0].layer.down for own in of_sample]).to(x.device)
            up = torch.stack([own[0].layer.up for own in of_sample]).to(x.device)
            factors = [own[0].layer.ratio * own[0].scale for own in of_sample]
            hidden = rows @ down.mT
            if len(set(factors)) == 1:
                hidden *= factors[0]
            else:
                hidden *= torch.tensor(factors, dtype=hidden.dtype).to(x.device)[:, None, None]
            return (hidden @ up.mT).reshape(*x.shape[:-1], -1)
        down = first.down.new_zeros(len(ranks), max(ranks), first.down.shape[1])
        up = first.up.new_zeros(len(ranks), first.up.shape[0], max(ranks))
        for i, own in enumerate(of_sample):
            end = 0
            for _, _, low_rank, scale in own:
                start, end = end, end + len(low_rank.down)
                down[i, start:end] = low_rank.down
                torch.mul(low_rank.up, low_rank.ratio * scale, out=up[i, :, start:end])
        return (rows @ down.mT.to(x.device) @ up.mT.to(x.device)).reshape(*x.shape[:-1], -1)


class _Inside:
    """Wraps a layer's own forward inside diffusers' hooks, which change its input and output.

    Some of these hooks pass on only a part of the sequence, or gather the output's parts (context parallelism).
    """

    def __init__(self, layer: nn.Module, reference: Any, added: _Added) -> None:
        """reference: diffusers' reference to the forward that is called innermost."""
        self._layer, self._reference, self._added = layer, reference, added
        self._own = reference.forward
        reference.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._added(self._layer, args, self._own(*args, **kwargs))

    def remove(self) -> None:
        self._reference.forward = self._own


def _hook(layer: nn.Module, added: _Added) -> Any:
    """Makes the layer call `added` after each forward, until the returned handle is removed."""
    registry: Any = getattr(layer, "_diffusers_hook", None)
    references = registry._fn_refs if registry is not None else ()
    return _Inside(layer, references[0], added) if references else layer.register_forward_hook(added)


def _num_bytes(weights: AdapterWeights) -> int:
    return sum(layer.nbytes for layers in weights.values() for layer in layers.values())


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)

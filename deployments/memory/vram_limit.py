"""A budget for weights on the GPU: weights that fit stay there, others are copied in for their call, then dropped.

The idea is DiffSynth-Studio's `vram_limit`; diffusers' group offloading is all or nothing, and accelerate's
`max_memory` has no budget for the weights that it leaves on the CPU. Here the weights that stay are chosen once,
by size alone: as many as fit, spread evenly along the model, so that on a GPU each copy overlaps with the
computation of the layers before it.

Weights stored in 8 bits (`layerwise_casting`) are copied as stored, and cast at each call.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from cluster.machines import accelerator
from deployments.memory.pinned import PinnedCopies
from deployments.memory.stats import VramLimitStats


@dataclass(eq=False)
class _Weight:
    """A parameter or buffer, and its places in the model: several if it is tied."""

    places: list[tuple[nn.Module, str]]
    host: torch.Tensor

    def put(self, value: torch.Tensor) -> None:
        """Sets the value. A parameter stays the same object, for ties, hooks and the state dict refer to it."""
        for module, name in self.places:
            if name in module._parameters:
                module.get_parameter(name).data = value
            else:
                module._buffers[name] = value


@dataclass(eq=False)
class _Leaf:
    """The weights that one module owns itself, which are copied in and dropped together."""

    modules: list[nn.Module]
    """The module; or all modules that share a tied weight."""
    weights: list[_Weight]
    must_stay: bool
    """Whether the weights may be in use at any time: their module calls other modules, or they are tied."""
    is_present: bool = False
    ahead: "tuple[list[torch.Tensor], Any] | None" = None
    """Copies in progress, and the event after which they are complete."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(weight.host.nbytes for weight in self.weights)


def least_bytes(model: nn.Module) -> int:
    """Returns the bytes that are on the device under any limit: weights that must stay, and the largest leaf."""
    leaves = list(_find_leaves(model))
    streamed = max((leaf.num_bytes for leaf in leaves if not leaf.must_stay), default=0)
    return sum(leaf.num_bytes for leaf in leaves if leaf.must_stay) + streamed


class VramLimit:
    """Holds one model to `limit_bytes` of weights on `device`. Only one thread may run the model.

    peak <= limit_bytes, unless the weights that must stay and the largest leaf exceed it: then those are the peak.
    On a GPU, if the limit has room for two of the largest leaf, the next leaf is fetched while one computes.
    """

    def __init__(
        self, model: nn.Module, *, limit_bytes: int, device: torch.device, is_pinned: bool = True
    ) -> None:
        """The model's weights must be in host memory. is_pinned: for a GPU, pin the streamed weights there."""
        self._device = device
        self._pinned = PinnedCopies() if is_pinned and accelerator.is_accelerator(device) else None
        self._present_bytes = self._peak_bytes = self._streamed_bytes = 0
        self._leaves = list(_find_leaves(model))
        largest = max((leaf.num_bytes for leaf in self._leaves if not leaf.must_stay), default=0)
        self._kept = _choose_kept(self._leaves, limit_bytes, reserve_bytes=largest)
        self._stream: Any = None
        if accelerator.is_accelerator(device):
            room = _choose_kept(self._leaves, limit_bytes, reserve_bytes=2 * largest)
            if sum(leaf.num_bytes for leaf in room) + 2 * largest <= limit_bytes:
                self._kept = room
                self._stream = accelerator.open_stream(device)
        self._after: dict[_Leaf, _Leaf] = {}
        """The streamed leaf that followed each leaf in the latest forward."""
        self._latest: _Leaf | None = None
        for leaf in self._leaves:
            self._watch(leaf)
        model.register_forward_pre_hook(self._move_inputs, with_kwargs=True, prepend=True)

    def stats(self) -> VramLimitStats:
        return VramLimitStats(
            kept_bytes=sum(leaf.num_bytes for leaf in self._kept),
            peak_bytes=self._peak_bytes,
            num_kept=len(self._kept),
            num_streamed=len(self._leaves) - len(self._kept),
            streamed_bytes=self._streamed_bytes,
        )

    def load(self) -> None:
        """Copies the kept weights to the device now, instead of at their first call."""
        for leaf in self._leaves:
            if leaf in self._kept:
                self._bring(leaf)

    def unload(self) -> None:
        """Drops all weights from the device, because another stage needs the memory; the next forward copies them
        in again."""
        for leaf in self._leaves:
            if leaf.ahead is not None:
                self._await(leaf)  # its memory must not be reused while a copy writes to it
            self._drop(leaf)
        self._present_bytes, self._latest = 0, None

    def _watch(self, leaf: _Leaf) -> None:
        if leaf not in self._kept and self._pinned is not None:
            for weight in leaf.weights:
                weight.host = self._pinned.copy(weight.host)
                weight.put(weight.host)
        for module in leaf.modules:
            module.register_forward_pre_hook(partial(self._bring, leaf), prepend=True)
            if leaf not in self._kept:
                module.register_forward_hook(partial(self._drop, leaf), always_call=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _move_inputs(self, _model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Moves the inputs to the device: pipelines leave them on the host if the model's weights are there."""
        return send_to_device((args, kwargs), self._device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _bring(self, leaf: _Leaf, *_: Any) -> None:
        if leaf.is_present:
            return
        copies = self._copy(leaf) if leaf.ahead is None else self._await(leaf)
        for weight, copy in zip(leaf.weights, copies, strict=True):
            weight.put(copy)
        leaf.is_present = True
        if leaf not in self._kept:
            self._streamed_bytes += leaf.num_bytes
            self._fetch_ahead(leaf)

    def _fetch_ahead(self, leaf: _Leaf) -> None:
        """Starts to copy the leaf that followed this one in the last forward, and most likely does so again."""
        if self._stream is None:
            return
        if self._latest is not None:
            self._after[self._latest] = leaf
        self._latest = leaf
        following = self._after.get(leaf)
        if following is None or following.ahead is not None or following.is_present:
            return
        self._count(following)
        # The copies are allocated on the computing stream, and written after the work queued there by now: so a
        # layer's memory can be reused as soon as the layer is dropped. If they were allocated on the copying
        # stream, a host that queues ahead of the GPU would need more and more memory.
        copies = [torch.empty_like(weight.host, device=self._device) for weight in following.weights]
        self._stream.wait_stream(accelerator.current_stream(self._device))
        with accelerator.on_stream(self._stream):
            for copy, weight in zip(copies, following.weights, strict=True):
                copy.copy_(weight.host, non_blocking=True)
        following.ahead = copies, accelerator.record_event(self._stream)

    def _await(self, leaf: _Leaf) -> list[torch.Tensor]:
        """Returns the copies fetched ahead. Work that is queued from now on waits until they are complete."""
        assert leaf.ahead is not None
        copies, done = leaf.ahead
        leaf.ahead = None
        accelerator.current_stream(self._device).wait_event(done)
        return copies

    def _copy(self, leaf: _Leaf) -> list[torch.Tensor]:
        """Copies a leaf's weights to the device; on the CPU too, so that tests there hold what a GPU holds."""
        self._count(leaf)
        return [weight.host.to(self._device, non_blocking=True, copy=True) for weight in leaf.weights]

    def _count(self, leaf: _Leaf) -> None:
        self._present_bytes += leaf.num_bytes
        self._peak_bytes = max(self._peak_bytes, self._present_bytes)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drop(self, leaf: _Leaf, *_: Any) -> None:
        if leaf.is_present:
            leaf.is_present = False
            self._present_bytes -= leaf.num_bytes
            for weight in leaf.weights:
                weight.put(weight.host)


def _find_leaves(model: nn.Module) -> Iterator[_Leaf]:
    """Yields the leaves in the order of the model's modules, which is roughly the order of its forward."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places[id(tensor)].append((module, name))
                tensors[id(tensor)] = tensor
    owners = {module for at in places.values() for module, _ in at}
    own_keys: dict[nn.Module, list[int]] = defaultdict(list)
    for key, at in places.items():
        own_keys[at[0][0]].append(key)
    for module, own in own_keys.items():
        weights = [_Weight(places[key], tensors[key].data) for key in own]
        tied = [weight for weight in weights if len(weight.places) > 1]
        if alone := [weight for weight in weights if len(weight.places) == 1]:
            calls_others = any(inner in owners for inner in module.modules() if inner is not module)
            yield _Leaf([module], alone, must_stay=calls_others)
        for weight in tied:
            yield _Leaf([place for place, _ in weight.places], [weight], must_stay=True)


def _choose_kept(leaves: Sequence[_Leaf], limit_bytes: int, *, reserve_bytes: int) -> set[_Leaf]:
    """Returns as many leaves as the limit has room for, evenly spread.

    The share of bytes kept, from the first leaf up to any other, is at most the share kept of the whole model.
    reserve_bytes: left free for the streamed leaves, if there are any.
    """
    kept = {leaf for leaf in leaves if leaf.must_stay}
    others = [leaf for leaf in leaves if not leaf.must_stay]
    total = sum(leaf.num_bytes for leaf in others)
    room = limit_bytes - sum(leaf.num_bytes for leaf in kept)
    if total <= room:
        return set(leaves)
    room = max(0, room - reserve_bytes)
    kept_bytes = seen_bytes = 0
    for leaf in others:
        seen_bytes += leaf.num_bytes
        if (kept_bytes + leaf.num_bytes) * total <= seen_bytes * room:
            kept_bytes += leaf.num_bytes
            kept.add(leaf)
    return kept

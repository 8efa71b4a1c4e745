"""Step caches: extrapolate the predictions of some steps from those of earlier steps, instead of computing them.

The choice is made in the request's thread, before its forward is queued. A reused prediction is returned at once
and crosses no ring; a computed forward is queued and may be merged with those of other requests. All state belongs
to the request, and ends with it.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from deployments.answers import ForwardCounts
from deployments.checkpoints.components import is_controlnet
from deployments.engine.merge import Inputs, latents_of
from deployments.engine.passes import Begin
from deployments.options.step_cache import StepCacheConfig


class StepCache:
    """Counts one request's forwards and, with a config, reuses predictions for some. Not thread-safe: a request
    has one thread."""

    def __init__(
        self, config: StepCacheConfig | None, begin: Begin, keep: Callable[[int], None] = lambda _num_bytes: None
    ) -> None:
        """
        Args:
            config: None computes every step, and keeps nothing.
            keep: called with the bytes that are to be kept in addition until the request ends, before any is kept.
        """
        self._config, self._begin, self._keep = config, begin, keep
        self._num_forwards = self._num_computed = self._kept_bytes = 0
        self._restart()

    def _restart(self) -> None:
        """Resets the state before the first step of a loop."""
        self._step = 0
        self._times: Sequence[float] = ()
        """The scheduler's times; known after the first step."""
        self._histories: dict[Hashable, _History] = {}
        self._criterion = None if self._config is None else _criterion(self._config)
        self._begin_step()

    def _begin_step(self) -> None:
        self._reuses: bool | None = None  # None until the step's first forward
        self._calls = count()

    @property
    def counts(self) -> ForwardCounts:
        return ForwardCounts(self._num_computed, self._num_forwards)

    def begin(self, slot: int, component: str, inputs: Inputs) -> Callable[[], Any]:
        """Like `Engine.begin`, for one request's forwards; reuses predictions where the config allows it."""
        self._num_forwards += 1
        if self._config is None or self._criterion is None:
            self._num_computed += 1
            return self._begin(slot, component, inputs)
        latents = latents_of(inputs)
        if self._reuses is None:
            self._reuses = self._is_between() and self._criterion.reuses(self._step, latents)
        history, step, criterion = self._history(component, latents), self._step, self._criterion

        def tell(output: Any) -> None:
            if not is_controlnet(component):
                criterion.saw(step, latents, output)

        if self._reuses and history.is_full:
            reused = history.extrapolated(self._times, step)
            tell(reused)
            return lambda: reused
        self._num_computed += 1
        wait = self._begin(slot, component, inputs)

        def computed() -> Any:
            output = wait()
            history.keep(step, output)
            tell(output)
            return output

        return computed

    def after_step(self, scheduler: Any, index: int) -> None:
        """Notes that timestep `index` of the scheduler is done."""
        if self._config is None:
            return
        if not self._times:
            self._times = scheduler.timesteps[index:].tolist()
        self._step += 1
        if self._step == len(self._times):
            self._restart()  # some pipelines run another loop, for the next part of a video
        self._begin_step()

    def _is_between(self) -> bool:
        """Returns whether the step may be reused: the first and last steps are always computed."""
        assert self._config is not None
        return self._config.first_steps <= self._step < len(self._times) - self._config.last_steps

    def _history(self, component: str, latents: Any) -> "_History":
        """Returns the history of one guidance pass, which is told by its position in the step and its shapes."""
        assert self._config is not None
        assert self._criterion is not None
        tensors = tree_leaves(latents)
        key = component, next(self._calls), tuple(tensor.shape for tensor in tensors)
        if key not in self._histories:
            order = 0 if is_controlnet(component) else self._config.order
            num_kept = order + 1 + (0 if self._histories else self._criterion.num_kept)
            self._histories[key] = _History(order, num_kept * sum(tensor.nbytes for tensor in tensors))
            self._tell_kept_bytes()
        return self._histories[key]

    def _tell_kept_bytes(self) -> None:
        total = sum(history.most_bytes for history in self._histories.values())
        if total > self._kept_bytes:
            self._keep(total - self._kept_bytes)
            self._kept_bytes = total


class _History:
    """The last computed predictions of one guidance pass."""

    def __init__(self, order: int, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: deque[tuple[int, Any]] = deque(maxlen=order + 1)

    @property
    def is_full(self) -> bool:
        return len(self._kept) == self._kept.maxlen

    def keep(self, step: int, output: Any) -> None:
        """Stores a copy, because pipelines and schedulers may write into what they get."""
        self._kept.append((step, tree_map(torch.clone, output)))

    def extrapolated(self, times: Sequence[float], step: int) -> Any:
        weights = extrapolation([times[kept] for kept, _ in self._kept], times[step])
        return tree_map(lambda *tensors: _weighted(tensors, weights), *(output for _, output in self._kept))


def extrapolation(at: Sequence[float], to: float) -> list[float]:
    """Returns the Lagrange weights of values at the times `at`, for the polynomial through them at the time `to`.

    Of equal times, which second-order schedulers have, the last counts.
    """
    last = {time: index for index, time in enumerate(at)}
    weights = [0.0] * len(at)
    for time, index in last.items():
        weights[index] = prod((to - other) / (time - other) for other in last if other != time)
    return weights


def _weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Returns the weighted sum, computed in float32 or in the tensors' own dtype if that is finer."""
    first = tensors[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=dtype)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(first.dtype)


class _EveryNth:
    """TaylorSeer's criterion: of every `interval` steps after the first ones, only the last is computed."""

    num_kept = 0

    def __init__(self, interval: int, first_steps: int) -> None:
        self._interval, self._first_steps = interval, first_steps

    def reuses(self, step: int, latents: Any) -> bool:
        return (step - self._first_steps + 1) % self._interval != 0

    def saw(self, step: int, latents: Any, output: Any) -> None:
        """Does nothing: the criterion depends only on the step's number."""


@dataclass
class _Seen:
    step: int
    latents: Any
    output: Any


class _ByChange:
    """EasyCache's criterion: computes a step once the estimated change of the predictions reaches the threshold.

    The estimate is the latents' change x the rate at which predictions followed it at the last computed step. The
    first pass of a step decides for all its passes.
    """

    num_kept = 2
    """Number of tensors of the latents' size that are kept: the last step's latents and its prediction."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._seen: _Seen | None = None
        self._rate: float | None = None
        """Change of the prediction / change of the latents, at the last computed step."""
        self._change = 0.0
        self._is_computing = True

    def reuses(self, step: int, latents: Any) -> bool:
        seen = self._seen
        if seen is None or self._rate is None:
            return False
        self._change += self._rate * _distance(latents, seen.latents) / _size(seen.output)
        self._is_computing = self._change >= self._threshold
        if self._is_computing:
            self._change = 0.0
        return not self._is_computing

    def saw(self, step: int, latents: Any, output: Any) -> None:
        seen = self._seen
        if seen is not None and seen.step == step:
            return  # another pass of the same step
        if seen is not None and self._is_computing and (moved := _distance(latents, seen.latents)):
            self._rate = _distance(output, seen.output) / moved
        self._seen = _Seen(step, tree_map(torch.clone, latents), tree_map(torch.clone, output))


_Criterion = _EveryNth | _ByChange


def _criterion(config: StepCacheConfig) -> _Criterion:
    if config.kind == "taylor_seer":
        return _EveryNth(config.interval, config.first_steps)
    return _ByChange(config.threshold)


def _distance(one: Any, other: Any) -> float:
    """Returns the mean absolute difference. Waits for the device."""
    return sum(
        float((a.float() - b.float()).abs().mean())
        for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True)
    )


def _size(of: Any) -> float:
    return sum(float(tensor.float().abs().mean()) for tensor in tree_leaves(of)) or 1.0

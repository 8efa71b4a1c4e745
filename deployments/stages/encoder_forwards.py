"""Forwards of text encoders that several prompts ask for: those of one shape run as one.

The pipeline's own encoding code runs for each prompt, over stand-ins that ask for a forward and get their own rows
of it. Prompts are padded by it, so most meet; one that is not, runs alone. So does a model that is not
transformers' own, whose outputs may not begin with the batch (Kolors' ChatGLM).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate, count
from typing import Any

import torch
from torch import nn

from deployments.engine.adapters import NO_ADAPTERS, AdapterLayers, Applied, Rows
from deployments.stages.call_key import call_key
from deployments.stages.lockstep import Ask
from deployments.stages.tensors import each_tensor, map_tensors

_TOKENS = "input_ids"


@dataclass(frozen=True, eq=False)
class EncoderForward:
    """One prompt's call of a text encoder."""

    component: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adapters: Applied = NO_ADAPTERS

    @property
    def inputs(self) -> dict[str, Any]:
        """All by name."""
        model_class: Any = type(self.model)
        return dict(zip(_names(model_class), self.args, strict=False)) | self.kwargs

    @property
    def num_rows(self) -> int:
        return len(self.inputs[_TOKENS])

    @property
    def key(self) -> Hashable:
        """Equal for calls that return the same."""
        return call_key(self.component, self.args, self.kwargs), self.adapters

    def signature(self) -> Hashable:
        """Equal for calls that may run as one; None: this one may not."""
        inputs, tokens = self.inputs, self.inputs.get(_TOKENS)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
            return None
        if any(tensor.shape != tokens.shape for tensor in each_tensor(inputs)):
            return None  # pictures, embeddings, or positions whose batch is not their first dimension
        of = map_tensors(lambda tensor: (str(tensor.dtype), tuple(tensor.shape)), inputs)
        return call_key(self.component, (), of), self.adapters


class StandIn:
    """A text encoder whose call is asked for; all else is the model's own."""

    def __init__(self, component: str, model: nn.Module, ask: Ask, adapters: Applied) -> None:
        self._component, self._model, self._ask, self._adapters = component, model, ask, adapters

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask(EncoderForward(self._component, self._model, args, kwargs, self._adapters))


def stand_ins(models: Mapping[str, nn.Module], ask: Ask, adapters: Applied) -> dict[str, StandIn]:
    """For the text encoders among a stage's models, by component name. adapters: of the request."""
    return {
        name: StandIn(name, model, ask, adapters)
        for name, model in models.items()
        if name.startswith("text_encoder") and type(model).__module__.startswith("transformers.")
    }


class EncoderForwards:
    """Runs what stand-ins ask for."""

    def __init__(self, naming: Callable[[], AbstractContextManager[None]], layers: AdapterLayers) -> None:
        """
        Args:
            naming: around work on the device: raises OutOfShare.
            layers: of the adapters that forwards name.
        """
        self._naming, self._layers = naming, layers
        self._unsplittable: set[str] = set()
        self.batch_sizes: Counter[int] = Counter()
        """How many forwards ran for so many prompts."""

    def run(self, forwards: Sequence[EncoderForward]) -> list[Any]:
        """What each returns, or the exception that it raises. A lone one is not touched."""
        alone = count()
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, forward in enumerate(forwards):
            is_mergeable = len(forwards) > 1 and forward.component not in self._unsplittable
            groups[(is_mergeable and forward.signature()) or next(alone)].append(i)
        answers: dict[int, Any] = {}
        for places in groups.values():
            answers.update(zip(places, self._run_group([forwards[i] for i in places]), strict=True))
        return [answers[i] for i in range(len(forwards))]

    def _run_group(self, group: Sequence[EncoderForward]) -> list[Any]:
        if len(group) == 1:
            return [self._run_alone(group[0])]
        try:
            with self._naming(), self._applied(group[0]):
                made = _run_merged(group)
        except _UnsplittableError:
            self._unsplittable.add(group[0].component)
        except Exception:  # of one, or of all together: each alone will tell
            pass
        else:
            self.batch_sizes[len(group)] += 1
            return made
        return [self._run_alone(forward) for forward in group]

    def _run_alone(self, forward: EncoderForward) -> Any:
        self.batch_sizes[1] += 1
        try:
            with self._naming(), self._applied(forward):
                return forward.model(*forward.args, **forward.kwargs)
        except Exception as error:
            return error

    def _applied(self, forward: EncoderForward) -> AbstractContextManager[None]:
        """Those of one forward are all of a group's."""
        return self._layers.applied(forward.component, [Rows(1, forward.adapters)])


class _UnsplittableError(Exception):
    """Of what a model returned: it does not begin with the batch."""


def _run_merged(group: Sequence[EncoderForward]) -> list[Any]:
    """Equal ones run once."""
    keys = [forward.key for forward in group]
    distinct = dict(zip(keys, group, strict=True))
    ends = list(accumulate(forward.num_rows for forward in distinct.values()))
    rows = {key: slice(end - distinct[key].num_rows, end) for key, end in zip(distinct, ends, strict=True)}
    inputs = [forward.inputs for forward in distinct.values()]
    merged = {
        name: torch.cat([each[name] for each in inputs]) if isinstance(value, torch.Tensor) else value
        for name, value in inputs[0].items()
    }
    output = group[0].model(**merged)
    return [_rows_of(output, rows[key], ends[-1]) for key in keys]


def _rows_of(output: Any, rows: slice, num_rows: int) -> Any:
    """A copy of them, in whatever a model returned; caches for texts that go on are left out."""
    if isinstance(output, torch.Tensor):
        if not output.ndim or len(output) != num_rows:
            raise _UnsplittableError
        return output[rows].clone()
    if isinstance(output, Mapping):
        parts = {name: _rows_of(value, rows, num_rows) for name, value in output.items()}
        return parts if type(output) is dict else type(output)(**parts)
    if isinstance(output, tuple | list):
        return type(output)(_rows_of(value, rows, num_rows) for value in output)
    return None


@cache
def _names(model_class: Any) -> tuple[str, ...]:
    return tuple(signature(model_class.forward).parameters)[1:]

"""Merges forwards of text encoders for several prompts: forwards of one shape run as one.

The pipeline's own encoding code runs for each prompt, with stand-ins that submit a forward and get their rows of
its output. That code pads prompts, so most forwards have the same shape; others run alone. A model that is not
transformers' own always runs alone, because its outputs may not begin with the batch (Kolors' ChatGLM).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import nn

from deployments.engine.adapters import NO_ADAPTERS, AdapterLayers, Applied, Rows
from deployments.engine.denoiser_stand_in import forward_input_names
from deployments.stages.call_key import call_key
from deployments.stages.tensors import each_tensor, map_tensors
from deployments.stages.texts.lockstep import Ask

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
        """All inputs, by name."""
        model_class: Any = type(self.model)
        return dict(zip(forward_input_names(model_class), self.args, strict=False)) | self.kwargs

    @property
    def num_rows(self) -> int:
        return len(self.inputs[_TOKENS])

    @property
    def key(self) -> Hashable:
        """A key that is equal for calls that return the same."""
        return call_key(self.component, self.args, self.kwargs), self.adapters

    def signature(self) -> Hashable:
        """Returns a signature that is equal for calls that may run as one; None: this one runs alone."""
        inputs, tokens = self.inputs, self.inputs.get(_TOKENS)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
            return None
        if any(tensor.shape != tokens.shape for tensor in each_tensor(inputs)):
            return None  # images, embeddings, or positions whose batch is not their first dimension
        of = map_tensors(lambda tensor: (str(tensor.dtype), tuple(tensor.shape)), inputs)
        return call_key(self.component, (), of), self.adapters


class EncoderStandIn:
    """A text encoder whose call goes through `ask`; all else is the model's own."""

    def __init__(self, component: str, model: nn.Module, ask: Ask, adapters: Applied) -> None:
        self._component, self._model, self._ask, self._adapters = component, model, ask, adapters

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask(EncoderForward(self._component, self._model, args, kwargs, self._adapters))


def encoder_stand_ins(models: Mapping[str, nn.Module], ask: Ask, adapters: Applied) -> dict[str, EncoderStandIn]:
    """Returns stand-ins for a stage's text encoders, by component name. adapters: the request's."""
    return {
        name: EncoderStandIn(name, model, ask, adapters)
        for name, model in models.items()
        if name.startswith("text_encoder") and type(model).__module__.startswith("transformers.")
    }


class EncoderForwards:
    """Runs the forwards that stand-ins submit."""

    def __init__(self, translating_oom: Callable[[], AbstractContextManager[None]], layers: AdapterLayers) -> None:
        """
        Args:
            translating_oom: context for work on the device, which raises OutOfDeviceMemory.
            layers: layers of the adapters that forwards name.
        """
        self._translating_oom, self._layers = translating_oom, layers
        self._unsplittable: set[str] = set()
        self.batch_sizes: Counter[int] = Counter()
        """Number of forwards by their number of prompts."""

    def run(self, forwards: Sequence[EncoderForward]) -> list[Any]:
        """Returns each forward's output, or the exception that it raises. A single forward runs unchanged."""
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
            with self._translating_oom(), self._applied(group[0]):
                made = _run_merged(group)
        except _UnsplittableError:
            self._unsplittable.add(group[0].component)
        except Exception:  # of one forward or of the merged one: running each alone will show
            pass
        else:
            self.batch_sizes[len(group)] += 1
            return made
        return [self._run_alone(forward) for forward in group]

    def _run_alone(self, forward: EncoderForward) -> Any:
        self.batch_sizes[1] += 1
        try:
            with self._translating_oom(), self._applied(forward):
                return forward.model(*forward.args, **forward.kwargs)
        except Exception as error:
            return error

    def _applied(self, forward: EncoderForward) -> AbstractContextManager[None]:
        """Applies a forward's adapters, which are the same for all forwards of its group."""
        return self._layers.applied(forward.component, [Rows(1, forward.adapters)])


class _UnsplittableError(Exception):
    """The output of a model does not begin with the batch, so it cannot be split."""


def _run_merged(group: Sequence[EncoderForward]) -> list[Any]:
    """Runs a group of forwards as one; equal forwards run once."""
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
    """Returns a copy of some rows of a model's output, whatever its nesting; key-value caches are left out."""
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

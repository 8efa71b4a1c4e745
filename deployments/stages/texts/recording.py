"""Records what a request's encoding methods return, with the keys by which other requests find the results."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from deployments.engine.adapters import Applied
from deployments.request import GenerationRequest
from deployments.stages.call import CONNECTORS, PipelineCall
from deployments.stages.call_key import call_key
from deployments.stages.tensors import map_tensors, without_shapes
from deployments.stages.texts.encoding_methods import Method
from deployments.stages.texts.truncation import Reading

Answer = Callable[[str, Method, Hashable, Any, Any], Any]
"""(name of an encoding method, the method, its call's key, args, kwargs) -> (CPU tensors, readings of the texts if
anything was cut off)"""


class Recording:
    """The record of one request's pipeline call."""

    def __init__(
        self, call: PipelineCall, request: GenerationRequest, adapters: Applied, answer: Answer, *, model: str
    ) -> None:
        """model: the model's name, because models that share encoders have one cache."""
        self._call, self._adapters, self._answer = call, adapters, answer
        self._asked = f"{model} {request.kind}"
        self._how = " weighted" * request.prompt.is_weighted
        self._keys: list[Hashable] = []
        self.made: list[tuple[str, Any]] = []
        """(name of a method, what is kept of its result), in the order of the call."""
        self.read: list[Reading] = []
        self.failed: list[Exception] = []
        """Exceptions of encoding methods; the rest of the call may raise others."""

    def replace(self, device: torch.device, name: str, method: Method) -> Method:
        """Returns what is called in place of a method. device: where the rest of the call expects the result."""

        def encode(*args: Any, **kwargs: Any) -> Any:
            follows = name == CONNECTORS  # its input is a GiB, and follows from earlier encodings
            given: tuple[Any, Any] = ((), {}) if follows else (args, kwargs)
            before = tuple(self._keys) if follows else ()
            self._keys.append((call_key(f"{self._asked} {name}{self._how}", *given), self._adapters, before))
            try:
                value, readings = self._answer(name, method, self._keys[-1], args, kwargs)
            except Exception as error:
                self.failed.append(error)
                raise
            self.made.append((name, self._call.kept(name, value)))
            self.read.extend(readings)
            return map_tensors(lambda one: one if one.is_meta else one.to(device), without_shapes(value))

        return encode

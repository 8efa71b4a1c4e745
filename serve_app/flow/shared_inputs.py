"""The inputs of a request's denoise calls: answers of other stages, which images with the same prompt share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.answers import NOTHING_PREPARED
from deployments.options.qos import Qos
from deployments.request import GenerationRequest


@dataclass(frozen=True)
class DenoiseInputs:
    """Inputs of a denoise call: un-awaited answers of other stages, and a reference to the input images."""

    conditioning: Any
    prepared: Any
    pictures: Any


class SharedInputs:
    """Requests the inputs once, passes them on un-awaited, and requests them again when they are lost."""

    def __init__(
        self, encoder: Any, vae: Any, request: GenerationRequest, pictures: Any, qos: Callable[[], Qos]
    ) -> None:
        """
        Args:
            encoder: a handle, with the session of this prompt.
            pictures: a reference to the input images, or None.
            qos: returns the request's Qos at the time of the call.
        """
        self._encoder, self._vae, self._request, self._pictures = encoder, vae, request, pictures
        self._qos = qos
        self._current: DenoiseInputs | None = None

    @property
    def current(self) -> DenoiseInputs:
        if self._current is None:
            request, pictures, qos = self._request, self._pictures, self._qos()
            conditioning = self._encoder.encode.remote(request, pictures, qos)
            prepared: Any = NOTHING_PREPARED
            if pictures is not None:
                prepared = self._vae.prepare.remote(conditioning, request, pictures, qos)
            self._current = DenoiseInputs(conditioning, prepared, pictures)
        return self._current

    def forget(self, lost: DenoiseInputs) -> None:
        """Makes the inputs be requested again, unless another image of the request has already caused that."""
        if self._current is lost:
            self._current = None

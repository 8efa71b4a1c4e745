"""Explains why a request fails: which of its fields is wrong, or why its latents are NaN or infinite."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from deployments.answers import DecodeArguments
from deployments.errors import WrongField, describe_cause
from deployments.request import GenerationRequest, InputPictures
from deployments.stages.call import Pictures, PipelineCalls
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.tensors import each_tensor
from deployments.stages.trials.trial import Trial

PIPELINE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What pipelines and schedulers raise for a field that they cannot take; there are many other causes too."""


class Faults:
    """Finds which field of a request is at fault when a pipeline's call fails."""

    def __init__(self, calls: PipelineCalls, trial: Trial, finite: FiniteCheck, dtype: torch.dtype) -> None:
        self._calls, self._trial, self._finite, self._dtype = calls, trial, finite, dtype

    @contextmanager
    def naming_the_field(
        self, request: GenerationRequest, opened: Pictures, pictures: InputPictures | None
    ) -> Iterator[None]:
        """Wraps a pipeline's call. Raises WrongField if it would fail whatever the model returns."""
        try:
            yield
        except PIPELINE_ERRORS as error:
            field = self._trial.find_fault(request, opened)
            if field is None:
                raise
            if field == "image" and pictures is not None:
                field = pictures.field
            call = self._calls.of(request).describe(request)
            raise WrongField(f"{call} does not take this {field}: {describe_cause(error)}", field) from error

    def check_finite(self, arguments: DecodeArguments, request: GenerationRequest) -> None:
        """Raises NonFinite if any of the tensors to decode is NaN or infinite."""
        for tensor in each_tensor(arguments.values):
            self._finite.check(tensor, partial(self._explain, request))

    def _explain(self, request: GenerationRequest) -> str:
        call, steps = self._calls.of(request).describe(request), request.num_inference_steps
        what = f"the latents are NaN or infinite after {steps} steps of {call}"
        if not self._trial.is_finite(request):
            return (
                f"{what}, whatever the model predicts: its scheduler divides by zero. Ask for more "
                "num_inference_steps, or check prediction_type and rescale_betas_zero_snr in its config"
            )
        return f"{what}: {dtype_advice('transformer.dtype', self._dtype)}"

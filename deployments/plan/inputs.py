"""Finds the inputs with which a checkpoint's denoisers are called for an image of a given size."""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from deployments.checkpoints.components import weightless
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.denoiser_stand_in import denoiser_stand_ins
from deployments.engine.load import Denoisers
from deployments.engine.merge import RULES, Inputs, Merger, num_tokens, patch_size
from deployments.request import MediaSize
from deployments.stages.call import PipelineCall
from deployments.stages.pipeline import load_pipeline
from deployments.stages.trials.blank import BlankTexts
from deployments.stages.trials.zeros import Zeros
from deployments.stages.warm_up import default_request


def first_inputs(
    denoisers: Denoisers,
    model: ModelConfig,
    config: TransformerConfig,
    size: MediaSize,
    *,
    num_text_tokens: int,
) -> dict[str, Inputs]:
    """Returns the inputs of each denoiser's first forward in a request with default values, by component name.

    Runs diffusers' own pipeline, with zeros as predictions, until it has called all denoisers. A denoiser that it
    does not call is left out.
    """
    zeros, found = Zeros(denoisers.skeletons), dict[str, Inputs]()

    def submit(component: str, inputs: Inputs) -> Any:
        found.setdefault(component, inputs)
        if len(found) == len(denoisers.skeletons):
            raise _AllAsked
        return zeros(component, inputs)

    pipe = load_pipeline(denoisers.folder, denoisers.index, weightless(denoisers.index), config, variant=None)
    cpu, request = torch.device("cpu"), default_request(model, size)
    models = denoiser_stand_ins(denoisers.skeletons, dtype=denoisers.dtype, device=cpu, submit=submit)
    blank = BlankTexts(denoisers.folder, denoisers.index, denoisers.dtype).on(cpu)
    call = PipelineCall(pipe, model.architecture.call)
    with suppress(_AllAsked):
        call.denoise(
            request,
            {**models, **blank},
            pictures=call.blank_pictures(request),
            max_sequence_length=num_text_tokens or None,
        )
    return found


class _AllAsked(BaseException):
    """Ends the pipeline's call. Not an `Exception`, so that no code in between handles it as an error."""


def merged_inputs(model: nn.Module, config: TransformerConfig, inputs: Inputs) -> tuple[Inputs, int]:
    """Returns the merged inputs of as many forwards as the step queue would merge into one, and their number.

    model: the denoiser, or its skeleton.
    """
    class_name = type(model).__name__
    batch_size = config.max_batch_size if class_name in RULES else 1
    if config.max_batch_tokens is not None:
        tokens = num_tokens(inputs, patch_size(model))
        batch_size = min(batch_size, config.max_batch_tokens // tokens)
    batch_size = max(1, batch_size)
    return Merger(class_name).merge([inputs] * batch_size), batch_size

"""What the models of a checkpoint are called with for a picture of some size: tensors on the meta device."""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from deployments.checkpoints.components import weightless
from deployments.config import ModelConfig, TransformerConfig
from deployments.engine.load import Denoisers
from deployments.engine.merge import RULES, Inputs, Merger, num_tokens, patch_size
from deployments.engine.stand_in import stand_ins
from deployments.request import MediaSize
from deployments.stages.blank import BlankTexts
from deployments.stages.call import PipelineCall
from deployments.stages.pipeline import load_pipeline
from deployments.stages.zeros import Zeros
from deployments.warm_up import default_request


def first_inputs(
    denoisers: Denoisers,
    model: ModelConfig,
    config: TransformerConfig,
    size: MediaSize,
    *,
    num_text_tokens: int,
) -> dict[str, Inputs]:
    """Of each denoiser's first forward in a request by the defaults, by component name: diffusers' own pipeline is
    run until it has asked for all, and answered with zeros meanwhile. One that it does not ask is not there."""
    zeros, found = Zeros(denoisers.skeletons), dict[str, Inputs]()

    def submit(component: str, inputs: Inputs) -> Any:
        found.setdefault(component, inputs)
        if len(found) == len(denoisers.skeletons):
            raise _AllAsked
        return zeros(component, inputs)

    pipe = load_pipeline(denoisers.folder, denoisers.index, weightless(denoisers.index), config, variant=None)
    cpu, request = torch.device("cpu"), default_request(model, size)
    models = stand_ins(denoisers.skeletons, dtype=denoisers.dtype, device=cpu, submit=submit)
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
    """Ends the call: no `Exception`, which somebody might take for a fault."""


def merged_inputs(model: nn.Module, config: TransformerConfig, inputs: Inputs) -> tuple[Inputs, int]:
    """As many forwards of these inputs as the step queue would merge into one, and how many those are.

    model: the denoiser, or its skeleton.
    """
    class_name = type(model).__name__
    batch_size = config.max_batch_size if class_name in RULES else 1
    if config.max_batch_tokens is not None:
        tokens = num_tokens(inputs, patch_size(model))
        batch_size = min(batch_size, config.max_batch_tokens // tokens)
    batch_size = max(1, batch_size)
    return Merger(class_name).merge([inputs] * batch_size), batch_size

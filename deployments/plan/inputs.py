"""What the models of a checkpoint are called with for a picture of some size: tensors on the meta device."""

from typing import NoReturn

import torch

from deployments.config import ModelConfig, TransformerConfig
from deployments.engine.load import Denoiser
from deployments.engine.merge import RULES, Inputs, Merger, num_tokens
from deployments.engine.stand_in import StandIn
from deployments.request import MediaSize
from deployments.stages.blank import BlankTexts
from deployments.stages.call import PipelineCall
from deployments.stages.pictures import blank_pictures
from deployments.stages.pipeline import load_pipeline
from deployments.warm_up import default_request


class _Called(Exception):
    """The pipeline has called its denoiser."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.inputs = inputs


def denoiser_inputs(
    denoiser: Denoiser,
    model: ModelConfig,
    config: TransformerConfig,
    size: MediaSize,
    *,
    num_text_tokens: int,
) -> Inputs:
    """Of the first forward of a request by the defaults: diffusers' own pipeline is run until it asks for it."""

    def submit(inputs: Inputs) -> NoReturn:
        raise _Called(inputs)

    pipe = load_pipeline(denoiser.folder, denoiser.index, frozenset({"scheduler"}), config, variant=None)
    call = PipelineCall(pipe, model.architecture.call)
    cpu = torch.device("cpu")
    stand_in = StandIn(denoiser.skeleton, dtype=denoiser.dtype, device=cpu, submit=submit)
    blank = BlankTexts(denoiser.folder, denoiser.index, denoiser.dtype).on(cpu)
    request = default_request(model, size)
    try:
        call.denoise(
            request,
            {denoiser.name: stand_in, **blank},
            pictures=blank_pictures(request),
            max_sequence_length=num_text_tokens or None,
        )
    except _Called as called:
        return called.inputs
    raise AssertionError(f"{call} never called its denoiser")


def merged_inputs(denoiser: Denoiser, config: TransformerConfig, inputs: Inputs) -> tuple[Inputs, int]:
    """As many forwards of these inputs as the step queue would merge into one, and how many those are."""
    class_name = denoiser.model_class.__name__
    batch_size = config.max_batch_size if class_name in RULES else 1
    if config.max_batch_tokens is not None:
        tokens = num_tokens(inputs, denoiser.config.get("patch_size", 1))
        batch_size = min(batch_size, config.max_batch_tokens // tokens)
    batch_size = max(1, batch_size)
    return Merger(class_name).merge([inputs] * batch_size), batch_size

"""What the models of a checkpoint are called with for a picture of some size: tensors on the meta device."""

from typing import NoReturn

import torch

from deployments.config import ModelConfig, TransformerConfig
from deployments.engine.load import Denoiser
from deployments.engine.merge import RULES, Inputs, Merger, num_tokens
from deployments.engine.stand_in import StandIn
from deployments.request import GenerationRequest, MediaSize, Prompt
from deployments.stages.pipeline import load_pipeline


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
    device = torch.device("cpu")
    stand_in = StandIn(denoiser.skeleton, dtype=denoiser.dtype, device=device, submit=submit)
    setattr(pipe, denoiser.name, stand_in)
    request = default_request(model, size)
    shapes = model.architecture.embed_shapes(denoiser.config, num_text_tokens)
    if request.prompt.is_guided:
        shapes = {**shapes, **{f"negative_{name}": shape for name, shape in shapes.items()}}
    try:
        pipe(
            **{name: torch.zeros(shape, dtype=denoiser.dtype) for name, shape in shapes.items()},
            **model.architecture.call(request),
            height=size.height,
            width=size.width,
            num_inference_steps=request.num_inference_steps,
            output_type="latent",
        )
    except _Called as called:
        return called.inputs
    raise AssertionError(f"{type(pipe).__name__} never called its denoiser")


def merged_inputs(denoiser: Denoiser, config: TransformerConfig, inputs: Inputs) -> tuple[Inputs, int]:
    """As many forwards of these inputs as the step queue would merge into one, and how many those are."""
    class_name = denoiser.model_class.__name__
    batch_size = config.max_batch_size if class_name in RULES else 1
    if config.max_batch_tokens is not None:
        tokens = num_tokens(inputs, denoiser.config.get("patch_size", 1))
        batch_size = min(batch_size, config.max_batch_tokens // tokens)
    batch_size = max(1, batch_size)
    return Merger(class_name).merge([inputs] * batch_size), batch_size


def default_request(
    model: ModelConfig, size: MediaSize, num_inference_steps: int | None = None
) -> GenerationRequest:
    """What somebody gets who asks for this size and nothing else."""
    family, defaults = model.architecture, model.request_defaults
    negative = defaults.negative_prompt
    is_guided = family.is_guided(defaults.guidance_scale, defaults.true_cfg_scale, negative is not None)
    return GenerationRequest(
        Prompt("", negative if is_guided else None, is_guided),
        width=size.width,
        height=size.height,
        num_frames=size.num_frames,
        num_inference_steps=num_inference_steps or defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        true_cfg_scale=defaults.true_cfg_scale,
        seed=0,
        output_format="png",
        output_compression=100,
        fps=defaults.fps,
    )

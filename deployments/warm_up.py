"""What a replica runs through its stage before it says that it is ready, so that no user waits for compiling."""

from dataclasses import dataclass

from deployments.config import ModelConfig
from deployments.request import GenerationRequest, MediaSize, Prompt


@dataclass(frozen=True)
class WarmUp:
    """Blank requests, one for each size in `model.warm_up`. Each stage makes its own inputs for them."""

    requests: tuple[GenerationRequest, ...] = ()
    max_sequence_length: int | None = None
    """As the encoder is told: the denoiser's inputs depend on it. None: the family's."""


NO_WARM_UP = WarmUp()


def default_request(
    model: ModelConfig, size: MediaSize, num_inference_steps: int | None = None
) -> GenerationRequest:
    """What somebody gets who asks for this size and nothing else."""
    defaults = model.request_defaults
    return GenerationRequest(
        default_prompt(model),
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


def default_prompt(model: ModelConfig) -> Prompt:
    """Without a word."""
    family, defaults = model.architecture, model.request_defaults
    negative = defaults.negative_prompt
    is_guided = family.is_guided(defaults.guidance_scale, defaults.true_cfg_scale, negative is not None)
    return Prompt("", negative if is_guided else None, is_guided)

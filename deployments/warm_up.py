"""What a replica runs through its stage before it says that it is ready, so that no user waits for compiling."""

from dataclasses import dataclass

from deployments.config import ModelConfig
from deployments.families import Call, Geometry
from deployments.request import GenerationRequest, MediaSize, Prompt


@dataclass(frozen=True)
class WarmUp:
    """Blank requests, one for each size in `model.warm_up`. Each stage makes its own inputs for them."""

    requests: tuple[GenerationRequest, ...] = ()
    max_sequence_length: int | None = None
    """As the encoder is told: the denoiser's inputs depend on it. None: the family's."""


NO_WARM_UP = WarmUp()


def tried_size(of: Geometry) -> MediaSize:
    """What stages try at their start: small, but not the least, at which some blocks see a single position.

    Of a video two more than the first latent frame, which is like no other, and some VAEs take them by twos. But
    no more than by default: some take no other number (Latte).
    """
    if of.sizes:
        width, height = min(of.sizes, key=lambda size: size[0] * size[1])
    else:
        width = height = 2 * of.size_multiple
    return MediaSize(width, height, min(2 * of.frame_stride + 1, of.num_frames))


def default_request(
    model: ModelConfig,
    size: MediaSize,
    num_inference_steps: int | None = None,
    *,
    call: Call | None = None,
) -> GenerationRequest:
    """What somebody gets who asks for this size and nothing else.

    call: of that kind; None: of the one that the checkpoint was saved for.
    """
    call = call or model.architecture.call
    defaults = model.defaults_of(call)
    return GenerationRequest(
        default_prompt(model, call),
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
        kind=call.kind,
        strength=defaults.strength,
        control_scale=defaults.control_scale,
        guidance_scale_2=defaults.guidance_scale_2,
    )


def default_prompt(model: ModelConfig, call: Call) -> Prompt:
    """Without a word."""
    defaults = model.defaults_of(call)
    negative = defaults.negative_prompt
    is_guided = call.is_guided(defaults.guidance_scale, defaults.true_cfg_scale, negative is not None)
    return Prompt("", negative if is_guided else None, is_guided, model.prompt_weighting)

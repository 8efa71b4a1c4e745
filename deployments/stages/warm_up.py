"""Requests that a replica runs through its stage before it is ready, so that no user waits for compilation."""

from dataclasses import dataclass, replace

from deployments.config.model import ModelConfig
from deployments.families import Call, Defaults, Geometry
from deployments.request import CallKind, GenerationRequest, MediaSize, Prompt


@dataclass(frozen=True)
class WarmUp:
    """Blank requests, one for each size in `model.warm_up`. Each stage makes its own inputs for them."""

    requests: tuple[GenerationRequest, ...] = ()
    max_sequence_length: int | None = None
    """The encoder's setting, on which the denoiser's inputs depend. None: the family's."""


NO_WARM_UP = WarmUp()


def tried_size(of: Geometry) -> MediaSize:
    """Returns the size that stages try at start: small, but not the smallest, where some blocks see one position.

    Videos have three latent frames (the first is special, and some VAEs need pairs), but at most the default
    number of frames, because some models take no other number (Latte).
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
    """Returns the request of a client who gives only a size.

    call: the request's kind of call; None: the one that the checkpoint was saved for.
    """
    call = call or model.architecture.call
    defaults = model.defaults_of(call)
    request = request_with_defaults(default_prompt(model, call), size, call.kind, defaults)
    return replace(request, num_inference_steps=num_inference_steps or defaults.num_inference_steps)


def request_with_defaults(
    prompt: Prompt, size: MediaSize | None, kind: CallKind, defaults: Defaults
) -> GenerationRequest:
    """Returns a request with the call's default settings. size: None: the pipeline's own."""
    return GenerationRequest(
        prompt,
        width=size.width if size else None,  # type: ignore[arg-type]
        height=size.height if size else None,  # type: ignore[arg-type]
        num_frames=size.num_frames if size else None,  # type: ignore[arg-type]
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        true_cfg_scale=defaults.true_cfg_scale,
        seed=0,
        output_format="png",
        output_compression=100,
        fps=defaults.fps,
        kind=kind,
        strength=defaults.strength,
        control_scale=defaults.control_scale,
        guidance_scale_2=defaults.guidance_scale_2,
    )


def default_prompt(model: ModelConfig, call: Call) -> Prompt:
    """Returns an empty prompt, guided if the call is guided by default."""
    defaults = model.defaults_of(call)
    negative = defaults.negative_prompt
    is_guided = call.is_guided(defaults.guidance_scale, defaults.true_cfg_scale, negative is not None)
    return Prompt("", negative if is_guided else None, is_guided, model.prompt_weighting)

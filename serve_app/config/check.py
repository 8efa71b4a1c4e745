"""Validates what a config makes requests default to, as if a request spelled it out, before anything starts."""

from typing import Any

from deployments.config.model import WARM_UP_SIZE, DefaultsConfig, ModelConfig
from deployments.families import Call
from deployments.request import GenerationRequest
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.inputs.pictures import blank_png
from serve_app.inputs.videos import blank_video
from serve_app.validation import Validator


def check_requests(config: AppConfig) -> None:
    """Validates the defaults of every served model. Raises ConfigError."""
    for served in config.served:
        with config.naming(served):
            check_defaults(served.model, config.limits)


def check_defaults(model: ModelConfig, limits: LimitsConfig) -> None:
    """Validates the defaults like a request that spells them out. Raises ConfigError."""
    try:
        size = model.default_size
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_schedulers(model)
    given = model.defaults.model_dump(exclude_none=True, exclude={"width", "height", "strength"})
    fields: dict[str, Any] = {
        "num_inference_steps": model.request_defaults.num_inference_steps,
        "size": f"{size.width}x{size.height}",
    }
    family = model.architecture
    if family.media == "video":
        fields["num_frames"] = size.num_frames
    if model.defaults.strength is not None and all(
        call.defaults.strength is None for call in family.calls.values()
    ):
        raise ConfigError(f"model.defaults: strength has no effect on {family.name}")
    unsaid = DefaultsConfig.model_construct(width=size.width, height=size.height)  # its size is validated below
    validator = Validator(model.model_copy(update={"defaults": unsaid}), limits)
    try:
        validator.requests({"prompt": "-"} | _blank_pictures(family.call, size.num_frames) | fields | given)
    except BadRequest as error:
        raise ConfigError(f"model.defaults, or the family's default where that sets none: {error}") from error


def _check_schedulers(model: ModelConfig) -> None:
    """Raises ConfigError if a scheduler has the name of the checkpoint's own."""
    for each in model.schedulers:
        if each.asked_as == model.own_scheduler and (each.options or each.class_name != each.asked_as):
            raise ConfigError(
                f"model.schedulers: {each.asked_as} is the name of the checkpoint's own: set `name` to another"
            )


def plan_warm_up(model: ModelConfig, limits: LimitsConfig) -> tuple[GenerationRequest, ...]:
    """Returns a guided request of two steps for each size in `model.warm_up`. Raises ConfigError."""
    validator = Validator(model, limits)
    steps = min(2, limits.max_num_inference_steps)  # a second step, to use what the first recorded or prefetched
    blank = {"prompt": "-", "negative_prompt": "", "num_inference_steps": steps}
    requests: list[GenerationRequest] = []
    for asked in model.warm_up:
        match = WARM_UP_SIZE.fullmatch(asked)
        assert match is not None
        num_frames = int(match[2] or model.default_size.num_frames)
        fields = {"size": match[1]} | ({} if match[2] is None else {"num_frames": num_frames})
        fields |= _blank_pictures(model.architecture.call, num_frames)
        try:
            requests += validator.requests(blank | fields)
        except BadRequest as error:
            raise ConfigError(f"model.warm_up, {asked}: {error}") from error
    return tuple(requests)


def _blank_pictures(call: Call, num_frames: int) -> dict[str, Any]:
    """Returns the required input images or video, for a request that is only validated. num_frames: of a video."""
    fields: dict[str, Any] = {} if call.defaults.strength is None else {"strength": 1.0}
    if call.control is not None:
        fields["control_image"] = blank_png()
    match call.kind:
        case "edit":
            fields["image"] = blank_png()
        case "inpaint":
            fields |= {"image": blank_png(), "mask": blank_png()}
        case "image_to_video":
            fields["input_reference"] = blank_png()
        case "video_to_video":
            fields["input_reference"] = blank_video(num_frames)
    return fields

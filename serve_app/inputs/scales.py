"""Scales that only some kinds of call have: strength, the scale of a ControlNet, and the guidance of a second
expert."""

from math import ceil

from deployments.families import Call, Defaults
from serve_app.errors import BadRequest


def choose_strength(asked: float | None, defaults: Defaults, steps: int) -> float | None:
    """Returns the strength for the input image. Raises BadRequest if it leaves no step to compute."""
    if asked is not None and defaults.strength is None:
        raise BadRequest(
            "strength has no effect on this model without an input image or video: leave it out",
            "strength",
        )
    strength = defaults.strength if asked is None else asked
    if strength is not None and int(steps * strength) < 1:
        raise BadRequest(
            f"strength: {strength:g} of {steps} steps is less than one step; ask for num_inference_steps of "
            f"{ceil(1 / strength)} or more, or for a higher strength",
            "strength",
        )
    return strength


def choose_control_scale(asked: float | None, defaults: Defaults) -> float | None:
    """Returns the weight of the ControlNet. Raises BadRequest if there is none."""
    if asked is not None and defaults.control_scale is None:
        raise BadRequest("control_scale: this model has no ControlNet: leave it out", "control_scale")
    return defaults.control_scale if asked is None else asked


def choose_guidance_scale_2(asked: float | None, call: Call, defaults: Defaults) -> float | None:
    """Returns the guidance scale of the expert for low noise. Raises BadRequest if there is none."""
    if asked is not None and not call.takes_guidance_scale_2:
        raise BadRequest("guidance_scale_2: this model has no second expert: leave it out", "guidance_scale_2")
    return defaults.guidance_scale_2 if asked is None else asked

"""The arguments of a pipeline's call."""

from typing import Any

import torch

from deployments.request import GenerationRequest
from deployments.stages.modular import call_names


def call_arguments(
    pipe: Any, request: GenerationRequest, max_sequence_length: int | None = None
) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call for a request: the fields that are set and that the call takes.

    pipe: the pipeline, or its class if it is not modular.
    """
    values = {
        "prompt": request.prompt.text,
        "negative_prompt": request.prompt.negative_text,
        "height": request.height,
        "width": request.width,
        **dict.fromkeys(("num_frames", "frames", "video_length"), request.num_frames),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "true_cfg_scale": request.true_cfg_scale,
        "strength": request.strength,
        "controlnet_conditioning_scale": request.control_scale,
        "frame_rate": request.fps,
        "max_sequence_length": max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
        # For pipelines that would choose another size near the requested one (FLUX.1-Kontext).
        "max_area": request.width and request.width * request.height,
        "_auto_resize": False,
        # Off because language models that rewrite prompts draw from the process's generator.
        "enable_prompt_rewrite": False,
        "use_pe": False,
        "use_resolution_binning": False,
    }
    parameters = call_names(pipe)
    known: dict[str, Any] = {
        name: value for name, value in values.items() if name in parameters and value is not None
    }
    if "guidance_schedule" in parameters and request.guidance_scale is not None:
        known["guidance_schedule"] = None  # its default fits a fixed number of steps and excludes a scale
    return known

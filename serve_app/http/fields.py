"""Parses the fields of a body, and suggests a known field for an unknown one."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serve_app.errors import BadRequest, named, quoted
from serve_app.inputs.pictures import MISREAD

Body = TypeVar("Body", bound=BaseModel)

MAX_FIELD_CHARACTERS = 40
_PICTURE = ("image", "input_reference", "send images to /v1/images/edits")
ELSEWHERE_CALLED: Mapping[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("steps", "num_steps", "sample_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("width", "height", "w", "h", "resolution", "image_size", "aspect_ratio"), "size"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "use guidance_scale or true_cfg_scale"),
    **dict.fromkeys(("negative", "neg_prompt", "prompt_negative"), "negative_prompt"),
    **dict.fromkeys(("num_images", "num_images_per_prompt", "batch_size", "num_outputs"), "n"),
    **dict.fromkeys(("frames", "video_length", "length"), "num_frames"),
    **dict.fromkeys(("duration", "duration_seconds"), "seconds"),
    **dict.fromkeys(("frame_rate", "framerate"), "fps"),
    **dict.fromkeys(("format", "image_format"), "output_format"),
    **dict.fromkeys(("output_quality", "jpeg_quality"), "output_compression"),
    **dict.fromkeys(("text", "input"), "prompt"),
    **dict.fromkeys(("generator", "manual_seed", "random_seed"), "seed"),
    **dict.fromkeys(("sampler", "sampler_name", "sampling_method", "scheduler_name"), "scheduler"),
    **dict.fromkeys(("deadline", "timeout", "timeout_s", "timeout_ms", "max_wait_s", "ttl"), "deadline_s"),
    **dict.fromkeys(("service_tier", "urgency", "queue_priority"), "priority"),
    **dict.fromkeys(("image", "images", "image[]", "init_image", "init_images", "input_image"), _PICTURE),
    **dict.fromkeys(
        ("image_url", "image_urls", "reference_image", "reference_images", "input_reference"), _PICTURE
    ),
    **dict.fromkeys(
        ("video", "input_video", "init_video", "source_video", "video_url", "reference_video"),
        ("input_reference", "send a video to /v1/videos/sync, where the model redraws it"),
    ),
    **dict.fromkeys(("first_frame", "first_frame_image", "start_image"), _PICTURE),
    **dict.fromkeys(("mask", "mask_image", "mask_url", "inpaint_mask"), ("mask", *_PICTURE[2:])),
    **dict.fromkeys(
        ("strength", "denoising_strength", "denoise", "image_strength", "prompt_strength"),
        ("strength", *_PICTURE[2:]),
    ),
}
"""Field names of other programs, and their names here: the first that the body has is suggested; if it has none,
the last entry is a hint."""


def parse_body(kind: type[Body], fields: Mapping[str, Any], *, is_json: bool = False) -> Body:
    """Parses the fields. Raises BadRequest that names the first wrong field.

    is_json: 5 must not be written "5", as it is in a form.
    """
    try:
        return kind.model_validate(fields, strict=is_json, context={"is_json": is_json})
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0], sorted(kind.model_fields)) from error


def _bad_request(mistake: Any, known: Sequence[str]) -> BadRequest:
    param = named(".".join(str(part) for part in mistake["loc"])) or None
    if mistake["type"] == "extra_forbidden":
        return BadRequest(f"{param}: unknown field{_hint(str(mistake['loc'][-1]), known)}", param)
    got = "" if mistake["type"] in ("missing", MISREAD) else f", got {quoted(mistake['input'])}"
    return BadRequest(f"{param or 'body'}: {mistake['msg']}{got}", param)


def _hint(field: str, known: Sequence[str]) -> str:
    """Returns a suggestion by the field's name in other programs, or by similar spelling."""
    name = field.lower().replace("-", "_")[:MAX_FIELD_CHARACTERS]
    called = ELSEWHERE_CALLED.get(name, ())
    meant = (called,) if isinstance(called, str) else called
    if not meant:
        meant = tuple(difflib.get_close_matches(name, known, n=1, cutoff=0.75))
    if not meant:
        return f"; known: {', '.join(known)}"
    field_here = next((each for each in meant if each in known), None)
    return f"; {meant[-1]}" if field_here is None else f"; did you mean {field_here}?"

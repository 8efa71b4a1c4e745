"""Converts bodies to requests with every default filled in; refuses invalid ones with an error that names the
field."""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.config.model import ModelConfig
from deployments.families import Call, Defaults
from deployments.options.adapter import AdapterCatalog, ScaledAdapter
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.options.step_cache import Quality
from deployments.request import CallKind, GenerationRequest, InputPictures, MediaSize, Prompt, StreamOptions
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest, UnknownModel, quoted
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, GenerationBody, ImageBody, VideoBody
from serve_app.inputs.cost import check_cost
from serve_app.inputs.lora import LoraBody, choose_adapters, split_model
from serve_app.inputs.pictures import validate_pictures
from serve_app.inputs.scales import choose_control_scale, choose_guidance_scale_2, choose_strength
from serve_app.inputs.sizes import Sizes
from serve_app.inputs.videos import validate_video
from serve_app.models.card import EDITS, GENERATIONS, VIDEOS

_REFERENCES: Mapping[CallKind, str] = {
    "image_to_video": "the image that the video begins with (PNG, JPEG or WebP)",
    "video_to_video": "a video to redraw (MP4 or WebM)",
}
"""What `input_reference` is for each kind of call."""


@dataclass(frozen=True)
class ValidatedBody:
    """The requests and options of one validated body."""

    requests: list[GenerationRequest]
    """One for each output image."""
    pictures: InputPictures | None
    """Input images, mask or video."""
    options: StreamOptions
    qos: Qos = DEFAULT_QOS


class Validator:
    """Validates bodies for one served model."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        self._model, self._limits = model, limits
        self.family = model.architecture
        self.catalog = AdapterCatalog(model.adapters, model.adapters_folder)
        self._sizes = Sizes(model.geometry, model.default_size, limits.max_pixels, limits.max_num_frames)

    def requests(self, fields: Mapping[str, Any]) -> list[GenerationRequest]:
        """Returns the requests for `fields`."""
        return self.validate_fields(fields).requests

    def validate_fields(self, fields: Mapping[str, Any]) -> ValidatedBody:
        """Validates the fields of an image, edit or video body, whichever of them they form and this model serves.

        `prompt` may be a list: then the requests are those of each prompt alone, with the same seeds, one after
        another.
        """
        prompts = fields.get("prompt")
        if not isinstance(prompts, list):
            return self._validate_one(fields)
        each = [self._validate_one({**fields, "prompt": prompt}) for prompt in prompts]
        requests = [request for validated in each for request in validated.requests]
        limit = self._limits.max_concurrent_requests
        if not 0 < len(requests) <= limit:
            raise BadRequest(
                f"prompt: a list must ask for 1 to {limit} images or videos in all, got {len(requests)}", "prompt"
            )
        return replace(each[0], requests=requests)

    def validate_stream(self, fields: Mapping[str, Any]) -> ValidatedBody:
        """Like `validate_fields`, for a caller that streams and so gets progress unless it declines."""
        if self.family.media == "video":
            return replace(self.validate_fields(fields), options=StreamOptions(wants_progress=True))
        return self._validate_one({"progress": True, **fields, "stream": True})

    def _validate_one(self, fields: Mapping[str, Any]) -> ValidatedBody:
        return self.validate(parse_body(self._body_kind(fields), fields))

    def _body_kind(self, fields: Mapping[str, Any]) -> type[ImageBody] | type[VideoBody]:
        if self.family.media == "video":
            return VideoBody
        has_pictures = not fields.keys().isdisjoint(("image", "mask", "control_image"))
        goes_in = "generate" not in self.family.calls or has_pictures
        return EditBody if goes_in else ImageBody

    def validate(self, body: ImageBody | VideoBody) -> ValidatedBody:
        """Validates a body; image i of n gets seed + i. Raises BadRequest or UnknownModel."""
        call = self._call(body)
        self._check_control(body, call)
        if isinstance(body, VideoBody):
            requests, options = [self._video(body, call)], StreamOptions()
        else:
            requests, options = self._images(body, call), body.stream_options
        check_cost(requests, self._limits.max_megapixel_steps, "limits.max_megapixel_steps")
        return ValidatedBody(requests, body.pictures, options, body.qos)

    def _images(self, body: ImageBody, call: Call) -> list[GenerationRequest]:
        for param in ("partial_images", "progress"):
            if getattr(body, param) and not body.stream:
                raise BadRequest(f"{param} needs stream: true, because it is sent before the image", param)
        if body.background is True and body.stream:
            raise BadRequest("background and stream do not combine: leave one out", "background")
        if body.output_format == "png" and body.output_compression != 100:
            raise BadRequest(
                f"output_compression is for jpeg and webp; png takes only 100, got {body.output_compression}",
                "output_compression",
            )
        first = self._request(
            body, call, output_format=body.output_format, output_compression=body.output_compression
        )
        return [_with_seed(first, (first["seed"] + i) % 2**63) for i in range(body.n)]

    def _video(self, body: VideoBody, call: Call) -> GenerationRequest:
        given, fps = self._given_video(body, call)
        fps = body.fps or fps or self._model.defaults_of(call).fps
        num_frames = self._sizes.read_frames(body.num_frames, body.seconds, fps, given)
        fields = self._request(body, call, shape=given, output_format="mp4", num_frames=num_frames, fps=fps)
        return GenerationRequest(**fields)

    def _given_video(self, body: VideoBody, call: Call) -> tuple[MediaSize | None, int | None]:
        """Returns the size and the frame rate of the input video, or (None, None) without one. Raises
        BadRequest."""
        pictures = body.pictures
        if not call.takes_video or pictures is None or pictures.video is None:
            return None, None
        return validate_video(pictures.video, pictures.field, self._limits)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is None or the served model's, with or without one of its adapters."""
        self._adapters(name, ())

    def _adapters(self, name: str | None, lora: Sequence[LoraBody]) -> tuple[ScaledAdapter, ...]:
        """name: the `model` of the request. Raises UnknownModel or BadRequest."""
        name, adapter = split_model(name, self._model.name)
        if name is not None and name != self._model.name:
            raise UnknownModel(f"model {quoted(name)} is not served here; served: {self._model.name!r}")
        return choose_adapters(self.catalog, adapter, lora)

    def _call(self, body: GenerationBody) -> Call:
        """Returns the kind of call that the body asks for. Raises BadRequest if this model does not have it."""
        model, calls = f"model {self._model.name!r}", self.family.calls
        if self.family.media != body.media:
            paths = {"image": GENERATIONS if "generate" in calls else EDITS, "video": VIDEOS}
            raise BadRequest(
                f"{model} makes {self.family.media}s: use {paths[self.family.media]}",
                "model",
            )
        kind = body.call_kind
        if isinstance(body, EditBody) and not body.image and (body.mask or body.control_image is None):
            raise BadRequest("image is missing: send the image to begin with", "image")
        if kind in calls:
            return calls[kind]
        if body.media == "video":
            raise _wrong_reference(kind, calls)
        if kind == "generate":
            raise BadRequest(f"{model} makes images from images: use {EDITS}", "model")
        if kind == "inpaint" and "edit" in calls:
            raise BadRequest("mask: this model takes no mask and redraws the whole image: leave it out", "mask")
        if kind == "edit" and "inpaint" in calls:
            raise BadRequest("mask is missing: this model redraws only the masked part", "mask")
        raise BadRequest(f"{model} makes images from text alone: use {GENERATIONS}", "model")

    def _check_control(self, body: GenerationBody, call: Call) -> None:
        """Raises BadRequest if a ControlNet's image is missing, or there is one without a ControlNet."""
        control = body.control_image if isinstance(body, EditBody) else None
        if control is None and call.control is not None:
            raise BadRequest(
                f"control_image is missing: this model needs one; send it to {EDITS}", "control_image"
            )
        if control is not None and call.control is None:
            raise BadRequest("control_image: this model has no ControlNet: leave it out", "control_image")

    def _request(
        self, body: GenerationBody, call: Call, *, shape: MediaSize | None = None, **own: Any
    ) -> dict[str, Any]:
        """Returns the fields of a GenerationRequest. shape: size of the input video."""
        adapters = self._adapters(body.model, body.lora)
        self._check_prompt(body.prompt)
        defaults = self._model.defaults_of(call)
        negative = defaults.negative_prompt if body.negative_prompt is None else body.negative_prompt
        self._check_length("negative_prompt", negative or "")
        picture = shape or self._picture_size(body, call)
        width, height = self._sizes.read(body.size, picture, own["output_format"])
        guidance_scale, true_cfg_scale = self._guidance(body, call, defaults)
        is_guided = call.is_guided(guidance_scale, true_cfg_scale, negative is not None)
        steps = self._steps(body.num_inference_steps, defaults)
        return {
            "prompt": Prompt(body.prompt, negative if is_guided else None, is_guided, self._is_weighted(body)),
            "width": width,
            "height": height,
            "num_frames": 1,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
            "output_compression": 100,
            "fps": defaults.fps,
            "kind": call.kind,
            "strength": choose_strength(getattr(body, "strength", None), defaults, steps),
            "control_scale": choose_control_scale(getattr(body, "control_scale", None), defaults),
            "guidance_scale_2": choose_guidance_scale_2(getattr(body, "guidance_scale_2", None), call, defaults),
            "model": self._model.name,
            **self._step_cache(body),
            "adapters": adapters,
            "scheduler": self._scheduler(body),
        } | own

    def _picture_size(self, body: GenerationBody, call: Call) -> MediaSize | None:
        """Returns the size of the first input image."""
        pictures = body.pictures
        if pictures is None:
            return None
        num, limit = len(pictures.images), call.max_images
        if num > limit:
            beside = " beside a mask" if call.kind == "inpaint" else ""
            raise BadRequest(
                f"{pictures.field}: this model takes at most {limit}{beside}, got {num}", pictures.field
            )
        return validate_pictures(pictures, self._limits)

    def _check_prompt(self, text: str) -> None:
        if not text.strip():
            raise BadRequest("prompt is empty: say what to draw", "prompt")
        self._check_length("prompt", text)

    def _check_length(self, param: str, text: str) -> None:
        limit = self._limits.max_prompt_characters
        if len(text) > limit:
            raise BadRequest(f"{param} has {len(text)} characters; the limit is {limit}", param)

    def _steps(self, steps: int | None, defaults: Defaults) -> int:
        limit = self._limits.max_num_inference_steps
        if steps is not None and steps > limit:
            raise BadRequest(
                f"num_inference_steps must be between 1 and {limit}, got {quoted(steps)}", "num_inference_steps"
            )
        return steps or defaults.num_inference_steps

    def _step_cache(self, body: GenerationBody) -> dict[str, Any]:
        """Returns fields of a GenerationRequest."""
        if body.step_cache is not None:
            return {"quality": None, "step_cache": body.step_cache}
        quality: Quality = body.quality if body.quality in ("medium", "low") else "high"
        return {"quality": quality, "step_cache": self._model.step_cache_of(quality)}

    def _is_weighted(self, body: GenerationBody) -> bool:
        can = self._model.prompt_weighting
        if body.prompt_weighting and not can:
            raise BadRequest(
                "prompt_weighting: this model reads prompts as they are: leave it out, or set "
                "model.prompt_weighting in its config",
                "prompt_weighting",
            )
        return can if body.prompt_weighting is None else body.prompt_weighting

    def _scheduler(self, body: GenerationBody) -> str | None:
        """Returns the requested scheduler; None: the checkpoint's own."""
        asked, names = body.scheduler, self._model.scheduler_names
        if asked in (None, self._model.own_scheduler):
            return None
        if asked not in names:
            known = ", ".join(names) or "only the checkpoint's own, which is the default"
            raise BadRequest(f"scheduler: {quoted(asked)} is not one of this model's: {known}", "scheduler")
        return asked

    def _guidance(self, body: GenerationBody, call: Call, defaults: Defaults) -> tuple[float | None, float | None]:
        """Returns (guidance_scale, true_cfg_scale). Raises BadRequest for a field that this kind of call does not
        have."""
        scales = []
        for param in ("guidance_scale", "true_cfg_scale"):
            asked, default = getattr(body, param), getattr(defaults, param)
            if asked is not None and default is None:
                raise BadRequest(f"{param} has no effect on {self.family.name}; use {call.guidance}", param)
            scales.append(default if asked is None else asked)
        return scales[0], scales[1]


def _wrong_reference(kind: CallKind, calls: Collection[CallKind]) -> BadRequest:
    """Returns the error for a kind of video call that this model does not have."""
    takes = " or ".join(what for known, what in _REFERENCES.items() if known in calls)
    if not takes:
        why = ": this model makes videos from text alone"
    elif kind == "generate":
        why = f" is missing: this model needs {takes}"
    else:
        why = f": it is {'a' if kind == 'video_to_video' else 'not a'} video: this model takes {takes}"
    return BadRequest(f"input_reference{why}", "input_reference")


def _with_seed(fields: dict[str, Any], seed: int) -> GenerationRequest:
    return GenerationRequest(**(fields | {"seed": seed}))

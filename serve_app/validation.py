"""Bodies become requests here, with every default filled in; whatever is wrong is refused here, by name."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from deployments.adapter import AdapterCatalog
from deployments.config import ModelConfig
from deployments.families import Call, Defaults
from deployments.request import CallKind, GenerationRequest, InputPictures, MediaSize, Prompt, StreamOptions
from deployments.step_cache import Quality
from serve_app.config import LimitsConfig
from serve_app.errors import BadRequest, UnknownModel, quoted
from serve_app.fields import parse_body
from serve_app.input_pictures import judge_pictures
from serve_app.input_videos import judge_video
from serve_app.lora import choose_adapters, split_model
from serve_app.model_card import EDITS, GENERATIONS, VIDEOS
from serve_app.openai_api import EditBody, GenerationBody, ImageBody, VideoBody
from serve_app.sizes import Sizes

_REFERENCES: Mapping[CallKind, str] = {
    "image_to_video": "the picture that the video begins with (PNG, JPEG or WebP)",
    "video_to_video": "a video to draw anew (MP4 or WebM)",
}
"""What goes in as `input_reference`."""


@dataclass(frozen=True)
class Judged:
    """What a body asks for."""

    requests: list[GenerationRequest]
    """One for each picture that comes out."""
    pictures: InputPictures | None
    """That go in."""
    options: StreamOptions


class Validator:
    """Judges bodies for one served model."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        self._model, self._limits = model, limits
        self.family = model.architecture
        self.catalog = AdapterCatalog(model.adapters, model.adapters_folder)
        self._sizes = Sizes(model.geometry, model.default_size, limits.max_pixels, limits.max_num_frames)

    def requests(self, fields: Mapping[str, Any]) -> list[GenerationRequest]:
        """Those of `fields`."""
        return self.judge_fields(fields).requests

    def judge_fields(self, fields: Mapping[str, Any]) -> Judged:
        """Those of an image's, an edit's or a video's body, whichever they make and this model serves.

        `prompt` may be a list: then what each of them makes alone, with the same seeds, one after another.
        """
        prompts = fields.get("prompt")
        if not isinstance(prompts, list):
            return self._judge_one(fields)
        each = [self._judge_one({**fields, "prompt": prompt}) for prompt in prompts]
        requests = [request for judged in each for request in judged.requests]
        limit = self._limits.max_concurrent_requests
        if not 0 < len(requests) <= limit:
            raise BadRequest(f"prompt: a list must ask for 1 to {limit} in all, got {len(requests)}", "prompt")
        return Judged(requests, each[0].pictures, each[0].options)

    def judge_stream(self, fields: Mapping[str, Any]) -> Judged:
        """Like `judge_fields`, for a caller that streams, and so gets progress unless it declines."""
        if self.family.media == "video":
            return replace(self.judge_fields(fields), options=StreamOptions(wants_progress=True))
        return self._judge_one({"progress": True, **fields, "stream": True})

    def _judge_one(self, fields: Mapping[str, Any]) -> Judged:
        return self.judge(parse_body(self._body_kind(fields), fields))

    def _body_kind(self, fields: Mapping[str, Any]) -> type[ImageBody] | type[VideoBody]:
        if self.family.media == "video":
            return VideoBody
        has_pictures = not fields.keys().isdisjoint(("image", "mask", "control_image"))
        goes_in = "generate" not in self.family.calls or has_pictures
        return EditBody if goes_in else ImageBody

    def judge(self, body: ImageBody | VideoBody) -> Judged:
        """Of a picture i has seed + i. Raises BadRequest or UnknownModel."""
        call = self._call(body)
        self._check_control(body, call)
        if isinstance(body, VideoBody):
            return Judged([self._video(body, call)], body.pictures, StreamOptions())
        return Judged(self._images(body, call), body.pictures, body.stream_options)

    def _images(self, body: ImageBody, call: Call) -> list[GenerationRequest]:
        for param in ("partial_images", "progress"):
            if getattr(body, param) and not body.stream:
                raise BadRequest(f"{param} needs stream: true, for it comes before the picture", param)
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
        """What is to be known of the one that goes in, and its frames a second. Raises BadRequest."""
        pictures = body.pictures
        if not call.takes_video or pictures is None or pictures.video is None:
            return None, None
        return judge_video(pictures.video, pictures.field, self._limits)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is the served one, or left out; one of its adapters may follow."""
        name, adapter = split_model(name, self._model.name)
        choose_adapters(self.catalog, adapter, ())
        if name is not None and name != self._model.name:
            raise UnknownModel(f"model {quoted(name)} is not served here; served: {self._model.name!r}")

    def _call(self, body: GenerationBody) -> Call:
        """The kind of call that the body asks for. Raises BadRequest where this model has none such."""
        model, calls = f"model {self._model.name!r}", self.family.calls
        if self.family.media != body.media:
            paths = {"image": GENERATIONS if "generate" in calls else EDITS, "video": VIDEOS}
            raise BadRequest(
                f"{model} makes {self.family.media}s: use {paths[self.family.media]}",
                "model",
            )
        kind = body.call_kind
        if isinstance(body, EditBody) and not body.image and (body.mask or body.control_image is None):
            raise BadRequest("image is missing: say what to begin with", "image")
        if kind in calls:
            return calls[kind]
        if body.media == "video":
            raise _wrong_reference(kind, calls)
        if kind == "generate":
            raise BadRequest(f"{model} makes pictures of pictures: use {EDITS}", "model")
        if kind == "inpaint" and "edit" in calls:
            raise BadRequest("mask: this model takes none, and draws the whole picture anew: leave it out", "mask")
        if kind == "edit" and "inpaint" in calls:
            raise BadRequest("mask is missing: this model fills in what a mask says", "mask")
        raise BadRequest(f"{model} makes pictures from text alone: use {GENERATIONS}", "model")

    def _check_control(self, body: GenerationBody, call: Call) -> None:
        """Raises BadRequest where a ControlNet has nothing to go by, or there is none."""
        control = body.control_image if isinstance(body, EditBody) else None
        if control is None and call.control is not None:
            raise BadRequest(
                f"control_image is missing, by which this model draws: send it to {EDITS}", "control_image"
            )
        if control is not None and call.control is None:
            raise BadRequest("control_image: this model has no ControlNet: leave it out", "control_image")

    def _request(
        self, body: GenerationBody, call: Call, *, shape: MediaSize | None = None, **own: Any
    ) -> dict[str, Any]:
        """Fields of a GenerationRequest. shape: of the video that goes in."""
        self.check_model(body.model)
        _, adapter = split_model(body.model, self._model.name)
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
            "prompt": Prompt(body.prompt, negative if is_guided else None, is_guided),
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
            "strength": _strength(body, defaults, steps),
            "control_scale": _control_scale(body, defaults),
            "guidance_scale_2": _guidance_scale_2(body, call, defaults),
            **self._step_cache(body),
            "adapters": choose_adapters(self.catalog, adapter, body.lora),
        } | own

    def _picture_size(self, body: GenerationBody, call: Call) -> MediaSize | None:
        """Of the first that goes in."""
        pictures = body.pictures
        if pictures is None:
            return None
        num, limit = len(pictures.images), call.max_images
        if num > limit:
            beside = " beside a mask" if call.kind == "inpaint" else ""
            raise BadRequest(f"{pictures.field}: this model takes {limit}{beside}, got {num}", pictures.field)
        return judge_pictures(pictures, self._limits)

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
        """Fields of a GenerationRequest."""
        if body.step_cache is not None:
            return {"quality": None, "step_cache": body.step_cache}
        quality: Quality = body.quality if body.quality in ("medium", "low") else "high"
        return {"quality": quality, "step_cache": self._model.step_cache_of(quality)}

    def _guidance(self, body: GenerationBody, call: Call, defaults: Defaults) -> tuple[float | None, float | None]:
        """(guidance_scale, true_cfg_scale); a field that this kind of call does not know is refused."""
        scales = []
        for param in ("guidance_scale", "true_cfg_scale"):
            asked, default = getattr(body, param), getattr(defaults, param)
            if asked is not None and default is None:
                raise BadRequest(f"{param} means nothing to {self.family.name}; use {call.guidance}", param)
            scales.append(default if asked is None else asked)
        return scales[0], scales[1]


def _wrong_reference(kind: CallKind, calls: Collection[CallKind]) -> BadRequest:
    """For a kind of call that makes videos, and that this model does not have."""
    takes = " or ".join(what for known, what in _REFERENCES.items() if known in calls)
    if not takes:
        why = ": this model makes videos from text alone"
    elif kind == "generate":
        why = f" is missing: this model needs {takes}"
    else:
        why = f": it is {'a' if kind == 'video_to_video' else 'no'} video: this model takes {takes}"
    return BadRequest(f"input_reference{why}", "input_reference")


def _strength(body: GenerationBody, defaults: Defaults, steps: int) -> float | None:
    """Of the picture that goes in; what leaves no step to do is refused."""
    asked = body.strength if isinstance(body, EditBody | VideoBody) else None
    if asked is not None and defaults.strength is None:
        raise BadRequest(
            "strength means nothing to this model without a picture or video that it draws anew: leave it out",
            "strength",
        )
    strength = defaults.strength if asked is None else asked
    if strength is not None and int(steps * strength) < 1:
        raise BadRequest(
            f"strength: {strength:g} of {steps} steps is less than one; ask for num_inference_steps of "
            f"{ceil(1 / strength)} or more, or for more strength",
            "strength",
        )
    return strength


def _control_scale(body: GenerationBody, defaults: Defaults) -> float | None:
    asked = body.control_scale if isinstance(body, EditBody) else None
    if asked is not None and defaults.control_scale is None:
        raise BadRequest("control_scale: this model has no ControlNet: leave it out", "control_scale")
    return defaults.control_scale if asked is None else asked


def _guidance_scale_2(body: GenerationBody, call: Call, defaults: Defaults) -> float | None:
    asked = body.guidance_scale_2 if isinstance(body, VideoBody) else None
    if asked is not None and not call.takes_guidance_scale_2:
        raise BadRequest("guidance_scale_2: this model has no second expert: leave it out", "guidance_scale_2")
    return defaults.guidance_scale_2 if asked is None else asked


def _with_seed(fields: dict[str, Any], seed: int) -> GenerationRequest:
    return GenerationRequest(**(fields | {"seed": seed}))

"""Bodies become requests here, with every default filled in; whatever is wrong is refused here, by name."""

import difflib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from deployments.config import WARM_UP_SIZE, DefaultsConfig, ModelConfig
from deployments.request import GenerationRequest, Prompt, StreamOptions
from serve_app.config import ConfigError, LimitsConfig
from serve_app.errors import BadRequest, UnknownModel, named, quoted
from serve_app.openai_api import GenerationBody, ImageBody, VideoBody

Body = TypeVar("Body", bound=GenerationBody)

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383, "mp4": 16_384}
"""Pixels; libjpeg, libwebp and x264 (16,384 is the most that H.264 level 6.2 has) encode no more."""
MAX_FIELD_CHARACTERS = 40
ELSEWHERE_CALLED = {
    **dict.fromkeys(("steps", "num_steps", "sample_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("width", "height", "w", "h", "resolution", "image_size", "aspect_ratio"), "size"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "say guidance_scale or true_cfg_scale"),
    **dict.fromkeys(("negative", "neg_prompt", "prompt_negative"), "negative_prompt"),
    **dict.fromkeys(("num_images", "num_images_per_prompt", "batch_size", "num_outputs"), "n"),
    **dict.fromkeys(("frames", "video_length", "length"), "num_frames"),
    **dict.fromkeys(("duration", "duration_seconds"), "seconds"),
    **dict.fromkeys(("frame_rate", "framerate"), "fps"),
    **dict.fromkeys(("format", "image_format"), "output_format"),
    **dict.fromkeys(("output_quality", "jpeg_quality"), "output_compression"),
    **dict.fromkeys(("text", "input"), "prompt"),
    **dict.fromkeys(("generator", "manual_seed", "random_seed"), "seed"),
    **dict.fromkeys(("scheduler", "sampler", "sampler_name"), "the scheduler is the checkpoint's"),
    **dict.fromkeys(("image", "images", "mask", "strength"), "pictures are made from text alone"),
}
"""Fields of other programs, and what to say here."""


class Validator:
    """Judges bodies for one served model."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        self._model, self._limits = model, limits
        self.family, self.defaults = model.architecture, model.request_defaults
        self.call = self.family.call
        self.geometry, self.default_size = model.geometry, model.default_size

    def requests(self, fields: Mapping[str, Any]) -> list[GenerationRequest]:
        """The fields of an image's or a video's body, whichever this model makes.

        `prompt` may be a list: then what each of them makes alone, with the same seeds, one after another.
        """
        prompts = fields.get("prompt")
        if not isinstance(prompts, list):
            return self._requests(fields)
        requests = [request for prompt in prompts for request in self._requests({**fields, "prompt": prompt})]
        limit = self._limits.max_concurrent_requests
        if not 0 < len(requests) <= limit:
            raise BadRequest(f"prompt: a list must ask for 1 to {limit} in all, got {len(requests)}", "prompt")
        return requests

    def _requests(self, fields: Mapping[str, Any]) -> list[GenerationRequest]:
        if self.family.media == "video":
            return [self.video(parse_body(VideoBody, fields))]
        return self.images(parse_body(ImageBody, fields))

    def streamed(self, fields: Mapping[str, Any]) -> tuple[list[GenerationRequest], StreamOptions]:
        """Like `requests`, for a caller that streams, and so gets progress unless it declines."""
        if self.family.media == "video":
            return self.requests(fields), StreamOptions(wants_progress=True)
        body = parse_body(ImageBody, {"progress": True, **fields, "stream": True})
        return self.images(body), body.stream_options

    def images(self, body: ImageBody) -> list[GenerationRequest]:
        """One request per picture; picture i has seed + i."""
        self._check_media("image")
        for param in ("partial_images", "progress"):
            if getattr(body, param) and not body.stream:
                raise BadRequest(f"{param} needs stream: true, for it comes before the picture", param)
        if body.output_format == "png" and body.output_compression != 100:
            raise BadRequest(
                f"output_compression is for jpeg and webp; png takes only 100, got {body.output_compression}",
                "output_compression",
            )
        first = self._request(body, output_format=body.output_format, output_compression=body.output_compression)
        return [_with_seed(first, (first["seed"] + i) % 2**63) for i in range(body.n)]

    def video(self, body: VideoBody) -> GenerationRequest:
        self._check_media("video")
        fps = body.fps or self.defaults.fps
        param = "seconds" if body.num_frames is None and body.seconds is not None else "num_frames"
        num_frames = body.num_frames or self.default_size.num_frames
        if param == "seconds":
            assert body.seconds is not None
            stride = self.geometry.frame_stride
            num_frames = round(body.seconds * fps / stride) * stride + 1
        self._check_frames(num_frames, param)
        fields = self._request(body, output_format="mp4", num_frames=num_frames, fps=fps)
        return GenerationRequest(**fields)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is the served one, or left out."""
        if name is not None and name != self._model.name:
            raise UnknownModel(f"model {quoted(name)} is not served here; served: {self._model.name!r}")

    def _check_media(self, media: str) -> None:
        if self.family.media != media:
            path = {"image": "/v1/images/generations", "video": "/v1/videos/sync"}[self.family.media]
            raise BadRequest(f"model {self._model.name!r} makes {self.family.media}s: use {path}", "model")

    def _check_frames(self, num_frames: int, param: str) -> None:
        stride, limit = self.geometry.frame_stride, self._limits.max_num_frames
        if num_frames > limit:
            raise BadRequest(f"{param} asks for {quoted(num_frames)} frames; the limit is {limit}", param)
        if (num_frames - 1) % stride:
            low = (num_frames - 1) // stride * stride + 1
            raise BadRequest(
                f"num_frames must be 1 more than a multiple of {stride}, got {num_frames}; "
                f"nearest: {low} or {low + stride}",
                param,
            )

    def _request(self, body: GenerationBody, **own: Any) -> dict[str, Any]:
        """Fields of a GenerationRequest."""
        self.check_model(body.model)
        self._check_prompt(body.prompt)
        negative = self.defaults.negative_prompt if body.negative_prompt is None else body.negative_prompt
        self._check_length("negative_prompt", negative or "")
        width, height = self._size(body.size)
        self._check_sides(width, height, own["output_format"])
        guidance_scale, true_cfg_scale = self._guidance(body)
        is_guided = self.call.is_guided(guidance_scale, true_cfg_scale, negative is not None)
        return {
            "prompt": Prompt(body.prompt, negative if is_guided else None, is_guided),
            "width": width,
            "height": height,
            "num_frames": 1,
            "num_inference_steps": self._steps(body.num_inference_steps),
            "guidance_scale": guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
            "output_compression": 100,
            "fps": self.defaults.fps,
        } | own

    def _check_prompt(self, text: str) -> None:
        if not text.strip():
            raise BadRequest("prompt is empty: say what to draw", "prompt")
        self._check_length("prompt", text)

    def _check_length(self, param: str, text: str) -> None:
        limit = self._limits.max_prompt_characters
        if len(text) > limit:
            raise BadRequest(f"{param} has {len(text)} characters; the limit is {limit}", param)

    def _size(self, size: str) -> tuple[int, int]:
        if size == "auto":
            return self.default_size.width, self.default_size.height
        match = SIZE.fullmatch(size)
        if match is None:
            raise BadRequest(f'size must be "WIDTHxHEIGHT" or "auto", got {quoted(size)}', "size")
        width, height = int(match[1]), int(match[2])
        multiple, limit = self.geometry.size_multiple, self._limits.max_pixels
        if width % multiple or height % multiple:
            near = "x".join(str(max(multiple, round(v / multiple) * multiple)) for v in (width, height))
            raise BadRequest(
                f"size: width and height must be multiples of {multiple}, got {size}; nearest: {near}", "size"
            )
        most = self.geometry.max_side
        if most is not None and max(width, height) > most:
            raise BadRequest(f"size: this model draws {most} pixels each way at most, got {size}", "size")
        if width * height > limit:
            raise BadRequest(f"size: {size} has {width * height} pixels; the limit is {limit} pixels", "size")
        return width, height

    def _check_sides(self, width: int, height: int, output_format: str) -> None:
        limit = MAX_SIDE.get(output_format)
        if limit is not None and max(width, height) > limit:
            instead = "" if output_format == "mp4" else "; use a smaller size, or output_format png"
            raise BadRequest(
                f"size: {width}x{height} is too long for output_format {output_format}, which has at most "
                f"{limit} pixels a side{instead}",
                "size",
            )

    def _steps(self, steps: int | None) -> int:
        limit = self._limits.max_num_inference_steps
        if steps is not None and steps > limit:
            raise BadRequest(
                f"num_inference_steps must be between 1 and {limit}, got {quoted(steps)}", "num_inference_steps"
            )
        return steps or self.defaults.num_inference_steps

    def _guidance(self, body: GenerationBody) -> tuple[float | None, float | None]:
        """(guidance_scale, true_cfg_scale); a field that this family does not know is refused."""
        scales = []
        for param in ("guidance_scale", "true_cfg_scale"):
            asked, default = getattr(body, param), getattr(self.defaults, param)
            if asked is not None and default is None:
                raise BadRequest(f"{param} means nothing to {self.family.name}; use {self.call.guidance}", param)
            scales.append(default if asked is None else asked)
        return scales[0], scales[1]


def check_defaults(model: ModelConfig, limits: LimitsConfig) -> None:
    """Judges the defaults like a request that spells them out. Raises ConfigError."""
    try:
        size = model.default_size
    except ValueError as error:
        raise ConfigError(str(error)) from error
    given = model.defaults.model_dump(exclude_none=True, exclude={"width", "height"})
    fields: dict[str, Any] = {
        "num_inference_steps": model.request_defaults.num_inference_steps,
        "size": f"{size.width}x{size.height}",
    }
    if model.architecture.media == "video":
        fields["num_frames"] = size.num_frames
    unsaid = DefaultsConfig.model_construct(width=size.width, height=size.height)  # judged below
    judge = Validator(model.model_copy(update={"defaults": unsaid}), limits)
    try:
        judge.requests({"prompt": "-"} | fields | given)
    except BadRequest as error:
        raise ConfigError(f"model.defaults, or the family's where it says nothing: {error}") from error


def plan_warm_up(model: ModelConfig, limits: LimitsConfig) -> tuple[GenerationRequest, ...]:
    """A guided request of two steps for each size in `model.warm_up`. Raises ConfigError."""
    judge = Validator(model, limits)
    steps = min(2, limits.max_num_inference_steps)  # a second, for what is recorded or fetched ahead by then
    blank = {"prompt": "-", "negative_prompt": "", "num_inference_steps": steps}
    requests: list[GenerationRequest] = []
    for asked in model.warm_up:
        match = WARM_UP_SIZE.fullmatch(asked)
        assert match is not None
        fields = {"size": match[1]} | ({} if match[2] is None else {"num_frames": int(match[2])})
        try:
            requests += judge.requests(blank | fields)
        except BadRequest as error:
            raise ConfigError(f"model.warm_up, {asked}: {error}") from error
    return tuple(requests)


def parse_body(kind: type[Body], fields: Mapping[str, Any], *, is_json: bool = False) -> Body:
    """Raises BadRequest that names the first wrong field.

    is_json: 5 is not to be written "5", as in a form.
    """
    try:
        return kind.model_validate(fields, strict=is_json)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0], sorted(kind.model_fields)) from error


def _bad_request(mistake: Any, known: Sequence[str]) -> BadRequest:
    param = named(".".join(str(part) for part in mistake["loc"])) or None
    if mistake["type"] == "extra_forbidden":
        return BadRequest(f"{param}: this field is not known{_hint(str(mistake['loc'][-1]), known)}", param)
    got = "" if mistake["type"] == "missing" else f", got {quoted(mistake['input'])}"
    return BadRequest(f"{param or 'body'}: {mistake['msg']}{got}", param)


def _hint(field: str, known: Sequence[str]) -> str:
    """What other programs call so, or what is spelled nearly so."""
    name = field.lower().replace("-", "_")[:MAX_FIELD_CHARACTERS]
    meant = ELSEWHERE_CALLED.get(name)
    if meant is None:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        meant = near[0] if near else None
    if meant is None:
        return f"; known: {', '.join(known)}"
    return f"; did you mean {meant}?" if meant in known else f"; {meant}"


def _with_seed(fields: dict[str, Any], seed: int) -> GenerationRequest:
    return GenerationRequest(**(fields | {"seed": seed}))

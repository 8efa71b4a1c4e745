"""Bodies of requests and answers, in OpenAI's shapes; fields beyond OpenAI's are marked."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deployments.request import CallKind, InputPictures, StreamOptions
from deployments.step_cache import Quality, StepCacheConfig
from deployments.video_format import find_format
from serve_app.input_pictures import DATA_URL_FORM, read_picture, read_pictures
from serve_app.lora import MAX_ADAPTERS, LoraBody

MAX_N = 10
"""Pictures of one request, as OpenAI allows."""
DATA_URL: dict[str, Any] = {
    "type": "string",
    "pattern": "^data:[^,]*;base64,",
    "examples": [DATA_URL_FORM],
}
PictureFile = Annotated[bytes, PlainValidator(read_picture), WithJsonSchema(DATA_URL)]
"""In a form a file, in JSON a data URL."""
PictureFiles = Annotated[
    tuple[bytes, ...],
    PlainValidator(read_pictures),
    WithJsonSchema({"anyOf": [DATA_URL, {"type": "array", "items": DATA_URL, "minItems": 1}]}),
]


class GenerationBody(BaseModel):
    """What pictures and videos have in common."""

    model_config = ConfigDict(extra="forbid")
    media: ClassVar[Literal["image", "video"]] = "image"

    model: str | None = Field(None, description="the served model's name; may be left out")
    prompt: str = Field(min_length=1)
    size: str = Field("auto", description='"WIDTHxHEIGHT" in pixels, or "auto" for the model\'s own size')
    user: str | None = Field(None, description="accepted, not used")
    safety_identifier: str | None = Field(None, description="accepted, not used; OpenAI's successor of `user`")

    negative_prompt: str | None = Field(None, description="beyond OpenAI")
    num_inference_steps: int | None = Field(None, ge=1, description="beyond OpenAI")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    true_cfg_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="beyond OpenAI; left out: drawn at random, told in the answer"
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None,
        description="medium and low reuse predictions of earlier steps, by the model's `tiers`: faster, another "
        "picture; of all others every step computes",
    )
    step_cache: StepCacheConfig | None = Field(
        None, description="beyond OpenAI; goes before `quality`: which steps reuse predictions of earlier ones"
    )

    lora: list[LoraBody] = Field(
        [], max_length=MAX_ADAPTERS, description="beyond OpenAI: adapters, whose effects add up"
    )

    @property
    def call_kind(self) -> CallKind:
        """What is asked of the model."""
        return "generate"

    @property
    def pictures(self) -> InputPictures | None:
        """That go in."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, fields: Any) -> Any:
        """In OpenAI's API a null stands for a field left out."""
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in fields.items() if v is not None or k not in cls.model_fields}

    @field_validator("step_cache", "lora", mode="before")
    @classmethod
    def _read_object(cls, value: Any) -> Any:
        """In a form it is JSON."""
        if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise PydanticCustomError("not_json", "no JSON: {why}", {"why": str(error)}) from error

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """JSON may hold half a character, which is no text, and knows one kind of number: 4.0 is an integer."""
        if isinstance(value, float) and value.is_integer():
            return int(value)
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "half_character",
                "character {place} is half of one (a lone surrogate): the text was cut inside it",
                {"place": error.start},
            ) from error
        return value


class ImageBody(GenerationBody):
    """`POST /v1/images/generations`."""

    n: int = Field(1, ge=1, le=MAX_N, description="pictures; the i-th uses seed + i")
    response_format: Literal["b64_json"] = Field(
        "b64_json", description="nothing is kept here that a url could name"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(
        100, ge=0, le=100, description="quality of jpeg and webp; 100 makes webp lossless"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted, without effect")
    background: Literal["auto", "opaque"] | None = Field(None, description="accepted; always opaque")
    moderation: Literal["auto", "low"] | None = Field(
        None, description="accepted, without effect: nothing is moderated here"
    )
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(
        0, ge=0, le=3, description="needs `stream`: pictures that are still forming, at most so many of each"
    )
    progress: bool = Field(False, description="beyond OpenAI; needs `stream`: steps done, time left")

    @field_validator("response_format", mode="before")
    @classmethod
    def _explain_url(cls, value: Any) -> Any:
        if value == "url":
            raise PydanticCustomError("no_url", "pictures come as b64_json, in the answer itself")
        return value

    @property
    def stream_options(self) -> StreamOptions:
        return StreamOptions(wants_progress=self.progress, num_partial_images=self.partial_images)


class EditBody(ImageBody):
    """`POST /v1/images/edits`."""

    image: PictureFiles = Field((), description="PNG, JPEG or WebP, or several where the model takes them")
    mask: PictureFile | None = Field(
        None,
        description="as large as the (first) image: what is transparent is drawn anew; of a mask without an alpha "
        "channel, what is white",
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="beyond OpenAI: how much of the picture is drawn anew"
    )
    control_image: PictureFile | None = Field(
        None, description="beyond OpenAI: says where things are, by edges, depths or poses; for a ControlNet"
    )
    control_scale: float | None = Field(None, ge=0, le=10, description="beyond OpenAI: how loud the ControlNet is")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="accepted, without effect")

    @property
    def call_kind(self) -> CallKind:
        if self.mask is not None:
            return "inpaint"
        return "edit" if self.image else "generate"

    @property
    def pictures(self) -> InputPictures:
        return InputPictures(self.image, self.mask, self.control_image)


class VideoBody(GenerationBody):
    """`POST /v1/videos/sync`."""

    media = "video"
    input_reference: PictureFile | None = Field(
        None, description="the picture that the video begins with, or a video (MP4 or WebM) to draw anew"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="beyond OpenAI: how much of the video that goes in is drawn anew"
    )
    guidance_scale_2: float | None = Field(
        None, ge=0, le=100, description="beyond OpenAI; of the expert for low noise; left out: as guidance_scale"
    )
    num_frames: int | None = Field(None, ge=1, description="beyond OpenAI; goes before `seconds`")
    seconds: float | None = Field(None, gt=0, le=3600)
    fps: int | None = Field(None, ge=1, le=120, description="beyond OpenAI")

    @property
    def call_kind(self) -> CallKind:
        if self.input_reference is None:
            return "generate"
        return "image_to_video" if find_format(self.input_reference) is None else "video_to_video"

    @property
    def pictures(self) -> InputPictures | None:
        given, field = self.input_reference, "input_reference"
        if given is None:
            return None
        is_video = find_format(given) is not None
        return InputPictures(video=given, field=field) if is_video else InputPictures((given,), field=field)


class TimingsMs(BaseModel):
    """Where one picture's time went, in milliseconds. Beyond OpenAI."""

    encode: float
    prepare: float = Field(0.0, description="of pictures that go in")
    queue: float
    denoise: float
    decode: float


class Forwards(BaseModel):
    """Of the denoisers. Beyond OpenAI."""

    computed: int
    asked: int = Field(description="by the pipeline; the others were reused by a step cache")


class Drawn(BaseModel):
    """How a picture was drawn. Beyond OpenAI, but for `quality`."""

    seed: int
    timings_ms: TimingsMs
    forwards: Forwards
    warnings: list[str] = Field(description="what was asked for and could have no effect")


class ImageData(Drawn):
    b64_json: str


class ImagesResponse(BaseModel):
    created: int = Field(description="Unix time, seconds")
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    quality: Quality | None = Field(description="the tier in effect; null: a step_cache of the request's own")
    data: list[ImageData]


class ImageEvent(BaseModel):
    """What all events of a streamed answer have in common."""

    type: str
    created_at: int = Field(description="Unix time, seconds")
    index: int = Field(description="of the n pictures, from 0. Beyond OpenAI")


class AnyProgressEvent(ImageEvent):
    """`progress: true`; a few a second at most. Beyond OpenAI."""

    phase: Literal["denoise", "decode"] = Field(description="before the first event: waiting, or encoding")
    step: int = Field(description="steps done")
    num_steps: int
    eta_s: float | None = Field(description="seconds left until the last step; null before the first is done")


class MediaEvent(ImageEvent):
    """An event that carries a picture."""

    b64_json: str
    size: str
    quality: Quality | Literal["auto"] | None = Field("auto", description="auto: of a picture that still forms")
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]


class AnyPartialImageEvent(MediaEvent):
    """A picture that is still forming; one that is not ready before its picture is never sent."""

    partial_image_index: int


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's clients expect it; nothing is counted here."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class AnyCompletedEvent(MediaEvent, Drawn):
    """A picture, and the last event of it."""

    usage: Usage = Usage()


class ProgressEvent(AnyProgressEvent):
    type: Literal["image_generation.progress"] = "image_generation.progress"


class PartialImageEvent(AnyPartialImageEvent):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"


class CompletedEvent(AnyCompletedEvent):
    type: Literal["image_generation.completed"] = "image_generation.completed"


class EditProgressEvent(AnyProgressEvent):
    type: Literal["image_edit.progress"] = "image_edit.progress"


class EditPartialImageEvent(AnyPartialImageEvent):
    type: Literal["image_edit.partial_image"] = "image_edit.partial_image"


class EditCompletedEvent(AnyCompletedEvent):
    type: Literal["image_edit.completed"] = "image_edit.completed"


class StageHealth(BaseModel):
    ok: bool
    stages: dict[str, str] = Field(description='"ok"; "asleep", until a request comes; or what is wrong')


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail

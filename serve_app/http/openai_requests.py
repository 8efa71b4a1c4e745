"""Bodies of requests in OpenAI's format; fields beyond OpenAI's are marked."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from deployments.media.video_format import find_format
from deployments.options.qos import Priority, Qos
from deployments.options.step_cache import StepCacheConfig
from deployments.request import CallKind, InputPictures, StreamOptions
from serve_app.inputs.lora import MAX_ADAPTERS, LoraBody
from serve_app.inputs.pictures import DATA_URL_FORM, read_picture, read_pictures

MAX_N = 10
"""Images of one request, as OpenAI allows."""
MAX_USER_CHARACTERS = 512
MAX_DEADLINE_S = 7 * 86_400.0
DATA_URL: dict[str, Any] = {
    "type": "string",
    "pattern": "^data:[^,]*;base64,",
    "examples": [DATA_URL_FORM],
}
PictureFile = Annotated[bytes, PlainValidator(read_picture), WithJsonSchema(DATA_URL)]
"""A file in a form, a data URL in JSON."""
PictureFiles = Annotated[
    tuple[bytes, ...],
    PlainValidator(read_pictures),
    WithJsonSchema({"anyOf": [DATA_URL, {"type": "array", "items": DATA_URL, "minItems": 1}]}),
]


class GenerationBody(BaseModel):
    """Fields of requests for images and for videos."""

    model_config = ConfigDict(extra="forbid")
    media: ClassVar[Literal["image", "video"]] = "image"

    model: str | None = Field(None, description="the served model's name; may be left out")
    prompt: str = Field(min_length=1)
    size: str = Field("auto", description='"WIDTHxHEIGHT" in pixels, or "auto" for the model\'s own size')
    user: str | None = Field(
        None, max_length=MAX_USER_CHARACTERS, description="name of the user; without keys, users get fair shares"
    )
    safety_identifier: str | None = Field(
        None, max_length=MAX_USER_CHARACTERS, description="OpenAI's successor of `user`; means the same"
    )
    priority: Priority = Field(
        "normal",
        description="beyond OpenAI: waiting requests go in the order high, normal, low; none starves",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        description="beyond OpenAI: give up this many seconds after the request arrives, or at the server's own "
        "limit if that is sooner; among otherwise equal requests, the earliest deadline goes first",
    )

    negative_prompt: str | None = Field(None, description="beyond OpenAI")
    num_inference_steps: int | None = Field(None, ge=1, description="beyond OpenAI")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    true_cfg_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="beyond OpenAI; default: random, and told in the answer"
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None,
        description="medium and low reuse predictions of earlier steps, as the model's `tiers` say: faster, but a "
        "different image; all other values compute every step",
    )
    step_cache: StepCacheConfig | None = Field(
        None, description="beyond OpenAI; overrides `quality`: which steps reuse predictions of earlier steps"
    )

    lora: list[LoraBody] = Field(
        [], max_length=MAX_ADAPTERS, description="beyond OpenAI: adapters, whose effects add up"
    )
    prompt_weighting: bool | None = Field(
        None,
        description="beyond OpenAI; whether to read `(word)1.3` as a weight, and long prompts to their end; "
        "default: true if the model can",
    )
    scheduler: str | None = Field(
        None, min_length=1, description="beyond OpenAI; one of those that /v1/models lists; default: the first"
    )

    @property
    def call_kind(self) -> CallKind:
        """The kind of call that the body asks for."""
        return "generate"

    @property
    def pictures(self) -> InputPictures | None:
        """Input images or video."""
        return None

    @property
    def qos(self) -> Qos:
        """The Qos, as far as the body specifies it."""
        return Qos(self.priority, self.user or self.safety_identifier or "", self.deadline_s)

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, fields: Any) -> Any:
        """Drops nulls: in OpenAI's API a null stands for a field left out."""
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in fields.items() if v is not None or k not in cls.model_fields}

    @field_validator("step_cache", "lora", mode="before")
    @classmethod
    def _read_object(cls, value: Any) -> Any:
        """Parses a form's text as JSON."""
        if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise PydanticCustomError("not_json", "not JSON: {why}", {"why": str(error)}) from error

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Converts 4.0 to an integer, because JSON has one kind of number, and refuses lone surrogates, which JSON
        may contain."""
        if isinstance(value, float) and value.is_integer():
            return int(value)
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "half_character",
                "character {place} is half a character (a lone surrogate): the text was cut inside it",
                {"place": error.start},
            ) from error
        return value


class ImageBody(GenerationBody):
    """`POST /v1/images/generations`."""

    n: int = Field(1, ge=1, le=MAX_N, description="number of images; image i, counted from 0, uses seed + i")
    response_format: Literal["b64_json"] = Field(
        "b64_json", description="url is not supported; a job keeps its images"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(
        100, ge=0, le=100, description="quality of jpeg and webp; 100 makes webp lossless"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="accepted, without effect")
    background: Literal["auto", "opaque", True, False] | None = Field(
        None,
        description="auto and opaque are accepted; images are always opaque. true, beyond OpenAI: answer with a "
        "job, which makes the images in the background",
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="accepted, without effect: nothing is moderated here"
    )
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(
        0, ge=0, le=3, description="needs `stream`: send at most this many unfinished versions of each image"
    )
    progress: bool = Field(False, description="beyond OpenAI; needs `stream`: report steps done and time left")

    @field_validator("background", mode="before")
    @classmethod
    def _read_flag(cls, value: Any, info: ValidationInfo) -> Any:
        """Converts "true" and "false" of a form, but not of JSON; and 1 does not count as true."""
        if isinstance(value, str) and not (info.context or {}).get("is_json"):
            return {"true": True, "false": False}.get(value, value)
        return str(value) if type(value) is int else value

    @field_validator("response_format", mode="before")
    @classmethod
    def _explain_url(cls, value: Any) -> Any:
        if value == "url":
            raise PydanticCustomError("no_url", "images are in the answer itself, as b64_json")
        return value

    @property
    def stream_options(self) -> StreamOptions:
        return StreamOptions(wants_progress=self.progress, num_partial_images=self.partial_images)


class EditBody(ImageBody):
    """`POST /v1/images/edits`."""

    image: PictureFiles = Field((), description="a PNG, JPEG or WebP file, or several if the model takes them")
    mask: PictureFile | None = Field(
        None,
        description="as large as the (first) image; its transparent parts are redrawn, or its white parts if it "
        "has no alpha channel",
    )
    strength: float | None = Field(None, gt=0, le=1, description="beyond OpenAI: how much of the image is redrawn")
    control_image: PictureFile | None = Field(
        None, description="beyond OpenAI: input of a ControlNet: edges, depths or poses that say where things are"
    )
    control_scale: float | None = Field(None, ge=0, le=10, description="beyond OpenAI: weight of the ControlNet")
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
    """`POST /v1/videos` and `/v1/videos/sync`."""

    media = "video"
    input_reference: PictureFile | None = Field(
        None, description="the image that the video begins with, or a video (MP4 or WebM) to redraw"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="beyond OpenAI: how much of the input video is redrawn"
    )
    guidance_scale_2: float | None = Field(
        None,
        ge=0,
        le=100,
        description="beyond OpenAI; guidance of the expert for low noise; default: guidance_scale",
    )
    num_frames: int | None = Field(None, ge=1, description="beyond OpenAI; overrides `seconds`")
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

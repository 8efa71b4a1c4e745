"""Bodies of answers, and events, in OpenAI's format; fields beyond OpenAI's are marked."""

from typing import Literal

from pydantic import (
    BaseModel,
    Field,
)

from deployments.options.step_cache import Quality


class TimingsMs(BaseModel):
    """The time that each stage took for one image, in milliseconds. Beyond OpenAI."""

    wake: float = Field(0.0, description="time until the sleeping model was awake")
    encode: float
    prepare: float = Field(0.0, description="time to prepare input images")
    queue: float
    denoise: float
    decode: float


class Forwards(BaseModel):
    """Forwards of the denoisers. Beyond OpenAI."""

    computed: int
    asked: int = Field(description="forwards that the pipeline asked for; a step cache reused those not computed")


class Drawn(BaseModel):
    """How an image was generated. Beyond OpenAI, but for `quality`."""

    seed: int
    timings_ms: TimingsMs
    forwards: Forwards
    warnings: list[str] = Field(
        description="parts of the request that had no effect, such as the end of a long prompt"
    )


class ImageData(Drawn):
    b64_json: str


class ImagesResponse(BaseModel):
    created: int = Field(description="Unix time, seconds")
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    quality: Quality | None = Field(description="the tier in effect; null if the request has its own step_cache")
    data: list[ImageData]


class ImageEvent(BaseModel):
    """Fields that all events of a streamed answer have."""

    type: str
    created_at: int = Field(description="Unix time, seconds")
    index: int = Field(description="number of the image among the n, from 0. Beyond OpenAI")


class AnyProgressEvent(ImageEvent):
    """Sent if `progress` is true, a few times a second at most. Beyond OpenAI."""

    phase: Literal["denoise", "decode"] = Field(
        description="before the first event, the request waits or is encoded"
    )
    step: int = Field(description="steps done")
    num_steps: int
    eta_s: float | None = Field(description="seconds left until the last step; null until the first is done")


class MediaEvent(ImageEvent):
    """An event that carries an image."""

    b64_json: str
    size: str
    quality: Quality | Literal["auto"] | None = Field("auto", description="auto: the image is unfinished")
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]


class AnyPartialImageEvent(MediaEvent):
    """An unfinished image. One that is not ready before the final image is never sent."""

    partial_image_index: int


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Present because OpenAI's clients expect it; nothing is counted here."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class AnyCompletedEvent(MediaEvent, Drawn):
    """A finished image, and its last event."""

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
    stages: dict[str, str] = Field(description='"ok"; "asleep" until a request comes; "waking"; or what is wrong')


class ModelsHealth(BaseModel):
    ok: bool = Field(description="whether all models are ok")
    models: dict[str, StageHealth] = Field(description="by model name")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail

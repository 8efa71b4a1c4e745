"""Bodies of requests and answers, in OpenAI's shapes; fields beyond OpenAI's are marked."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GenerationBody(BaseModel):
    """What pictures and videos have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="the served model's name; may be left out")
    prompt: str = Field(min_length=1)
    size: str = Field("auto", description='"WIDTHxHEIGHT" in pixels, or "auto" for the model\'s own size')
    user: str | None = Field(None, description="accepted, not used")

    negative_prompt: str | None = Field(None, description="beyond OpenAI")
    num_inference_steps: int | None = Field(None, ge=1, description="beyond OpenAI")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    true_cfg_scale: float | None = Field(None, ge=0, le=100, description="beyond OpenAI")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="beyond OpenAI; left out: drawn at random, told in the answer"
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, fields: Any) -> Any:
        """In OpenAI's API a null stands for a field left out."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class ImageBody(GenerationBody):
    """`POST /v1/images/generations`."""

    n: int = Field(1, ge=1, le=10, description="pictures; the i-th uses seed + i")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(
        100, ge=0, le=100, description="quality of jpeg and webp; 100 makes webp lossless"
    )
    quality: Literal["auto"] | None = Field(None, description="accepted; steps decide the quality here")
    background: Literal["auto", "opaque"] | None = Field(None, description="accepted; always opaque")
    moderation: Literal["auto"] | None = Field(None, description="accepted; nothing is moderated here")


class VideoBody(GenerationBody):
    """`POST /v1/videos/sync`."""

    num_frames: int | None = Field(None, ge=1, description="beyond OpenAI; goes before `seconds`")
    seconds: float | None = Field(None, gt=0, le=3600)
    fps: int | None = Field(None, ge=1, le=120, description="beyond OpenAI")


class TimingsMs(BaseModel):
    """Where one picture's time went, in milliseconds. Beyond OpenAI."""

    encode: float
    queue: float
    denoise: float
    decode: float


class ImageData(BaseModel):
    b64_json: str
    seed: int
    timings_ms: TimingsMs


class ImagesResponse(BaseModel):
    created: int = Field(description="Unix time, seconds")
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    data: list[ImageData]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latent-relay"
    family: str
    media: Literal["image", "video"]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class StageHealth(BaseModel):
    ok: bool
    stages: dict[str, str] = Field(description='"ok", or what is wrong')


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail

"""What clients may want to know about a served model before they send a request."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from pydantic import BaseModel, Field

from deployments.config.model import ModelConfig
from deployments.families import Geometry
from deployments.options.adapter import AdapterConfig
from deployments.options.step_cache import Quality, StepCacheConfig
from deployments.request import CallKind
from serve_app.config.limits import LimitsConfig
from serve_app.http.openai_requests import MAX_N
from serve_app.inputs.lora import SEPARATOR

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos/sync"
VIDEO_JOBS, IMAGE_JOBS = "/v1/videos", "/v1/images/jobs"
PATHS: Mapping[tuple[Literal["image", "video"], CallKind], str] = {
    ("image", "generate"): GENERATIONS,
    ("image", "edit"): EDITS,
    ("image", "inpaint"): EDITS,
    ("video", "generate"): VIDEOS,
    ("video", "image_to_video"): VIDEOS,
    ("video", "video_to_video"): VIDEOS,
}
"""Path of the requests for each media and kind of call."""


class CallDefaults(BaseModel):
    """What a request that leaves a field out gets; null: this kind of call takes no such field."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None
    strength: float | None
    control_scale: float | None
    guidance_scale_2: float | None = Field(
        description="guidance scale of a second expert; null: the same as guidance_scale"
    )


class ModelDefaults(CallDefaults):
    """The defaults of the kind of call that the checkpoint was saved for."""

    size: str = Field(
        description="size of a request without images; with images, auto takes the shape of the first"
    )
    num_frames: int | None
    fps: int | None


class CallCard(BaseModel):
    """One kind of call: requests to `path` with such input images or video."""

    path: str
    max_images: int = Field(description="most input images for one output image; 0: none")
    takes_video: bool = Field(description="whether the input is a video, which is redrawn")
    takes_guidance_scale_2: bool
    needs_control: bool = Field(description="whether a control_image is required")
    defaults: CallDefaults


class ModelLimits(BaseModel):
    """What a request may ask for."""

    size_multiple: int = Field(description="width and height must be multiples of this")
    sizes: tuple[str, ...] = Field(description="all sizes that a request may ask for; empty: any size")
    max_side: int | None = Field(
        description="limit of the width, and of the height; null: only their product is limited"
    )
    max_pixels: int = Field(description="width times height")
    max_num_inference_steps: int
    max_megapixel_steps: float = Field(
        description="cost of one request: width x height x frames x steps x n / 10⁶; a key may have a lower limit"
    )
    max_prompt_characters: int
    max_n: int = MAX_N
    frame_stride: int = Field(description="num_frames must be 1 more than a multiple of this")
    max_num_frames: int
    max_image_bytes: int = Field(description="file size of each input image")
    max_image_pixels: int = Field(
        description="width times height of each input image, and of each frame of an input video"
    )
    max_video_bytes: int = Field(description="file size of an input video")


class AdapterCard(BaseModel):
    """One LoRA adapter."""

    name: str
    about: str
    scale: float = Field(description="scale if the request gives none")


class ModelCard(BaseModel):
    """One served model. The fields after `owned_by` are beyond OpenAI."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latent-relay"
    family: str
    media: Literal["image", "video"]
    guidance: Literal["guidance_scale", "true_cfg_scale"] = Field(
        description="the field that must be above 1 for a negative prompt to have an effect"
    )
    about: str = Field(description="what the model can draw, in words for people")
    examples: tuple[str, ...] = Field(description="prompts that it draws well")
    calls: dict[CallKind, CallCard] = Field(description="the kinds of call that it serves")
    tiers: dict[Quality, StepCacheConfig | None] = Field(
        description="what a request's `quality` stands for; null: every step is computed"
    )
    adapters: tuple[AdapterCard, ...] = Field(
        description="adapters that a request may name in `lora`, or in `model` after the id"
    )
    parent: str | None = Field(description="if the card is that of an adapter: the id of its model")
    schedulers: tuple[str, ...] = Field(
        description="schedulers that a request may ask for, the default first; empty: only the checkpoint's own"
    )
    prompt_weighting: bool = Field(
        description="whether `(word)1.3` is read as a weight, and long prompts to their end"
    )
    defaults: ModelDefaults
    limits: ModelLimits

    def with_adapters(self) -> "list[ModelCard]":
        """Returns this card, and a copy for each adapter, for clients that can only choose a model."""
        by_id = {f"{self.id}{SEPARATOR}{adapter.name}": adapter for adapter in self.adapters}
        changes = {id: {"about": adapter.about, "parent": self.id} for id, adapter in by_id.items()}
        return [self, *(self.model_copy(update={"id": id} | own) for id, own in changes.items())]


def model_card(
    model: ModelConfig,
    created: int,
    limits: LimitsConfig,
    adapters: Mapping[str, AdapterConfig] = MappingProxyType({}),
) -> ModelCard:
    """Builds the card from the model's config, its checkpoint and its family, in this order. adapters: those that
    exist at the time of the call."""
    family, own, size = model.architecture, model.request_defaults, model.default_size
    defaults = {kind: vars(model.defaults_of(call)) for kind, call in family.calls.items()}
    is_video = family.media == "video"
    return ModelCard(
        id=model.name,
        about=model.about,
        examples=model.examples,
        created=created,
        family=family.name,
        media=family.media,
        guidance=family.call.guidance,
        calls={
            kind: CallCard(
                path=EDITS if call.control else PATHS[family.media, kind],
                max_images=call.max_images,
                takes_video=call.takes_video,
                takes_guidance_scale_2=call.takes_guidance_scale_2,
                needs_control=call.control is not None,
                defaults=CallDefaults(**defaults[kind]),
            )
            for kind, call in family.calls.items()
            if (family.media, kind) in PATHS
        },
        adapters=tuple(
            AdapterCard(name=name, about=each.about, scale=each.scale) for name, each in adapters.items()
        ),
        parent=None,
        tiers={quality: model.step_cache_of(quality) for quality in get_args(Quality)},
        schedulers=model.scheduler_names,
        prompt_weighting=model.prompt_weighting,
        defaults=ModelDefaults(
            **defaults[family.call.kind] | {"fps": own.fps if is_video else None},
            size=f"{size.width}x{size.height}",
            num_frames=size.num_frames if is_video else None,
        ),
        limits=_model_limits(limits, model.geometry),
    )


def _model_limits(limits: LimitsConfig, geometry: Geometry) -> ModelLimits:
    return ModelLimits(
        size_multiple=geometry.size_multiple,
        max_side=geometry.max_side,
        max_pixels=limits.max_pixels,
        max_num_inference_steps=limits.max_num_inference_steps,
        max_megapixel_steps=limits.max_megapixel_steps,
        max_prompt_characters=limits.max_prompt_characters,
        sizes=tuple(f"{width}x{height}" for width, height in geometry.sizes),
        frame_stride=geometry.frame_multiple,
        max_num_frames=limits.max_num_frames,
        max_image_bytes=limits.max_image_bytes,
        max_image_pixels=limits.max_image_pixels,
        max_video_bytes=limits.max_video_bytes,
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]

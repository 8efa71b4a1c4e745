"""What clients may want to know of a served model before they ask for a picture."""

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, Field

from deployments.adapter import AdapterConfig
from deployments.config import ModelConfig
from deployments.request import CallKind
from deployments.step_cache import Quality, StepCacheConfig
from serve_app.config import LimitsConfig
from serve_app.lora import SEPARATOR
from serve_app.openai_api import MAX_N

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos/sync"
PATHS: Mapping[tuple[Literal["image", "video"], CallKind], str] = {
    ("image", "generate"): GENERATIONS,
    ("image", "edit"): EDITS,
    ("image", "inpaint"): EDITS,
    ("video", "generate"): VIDEOS,
    ("video", "image_to_video"): VIDEOS,
    ("video", "video_to_video"): VIDEOS,
}
"""Where a model that makes this is asked for that."""


class CallDefaults(BaseModel):
    """What a request that leaves a field out gets; null: this kind of call takes no such field."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None
    strength: float | None
    control_scale: float | None
    guidance_scale_2: float | None = Field(description="of a second expert; null: as guidance_scale")


class ModelDefaults(CallDefaults):
    """Those of the kind of call that the checkpoint was saved for."""

    size: str = Field(description="of a request without pictures; with them, auto has the shape of the first")
    num_frames: int | None
    fps: int | None


class CallCard(BaseModel):
    """One kind of call: what is asked at `path` with such pictures."""

    path: str
    max_images: int = Field(description="pictures that go into one that comes out; 0: none")
    takes_video: bool = Field(description="whether a video goes in, of which another is made")
    takes_guidance_scale_2: bool
    needs_control: bool = Field(description="whether a control_image must go in")
    defaults: CallDefaults


class ModelLimits(BaseModel):
    """What a request may ask for."""

    size_multiple: int = Field(description="width and height must be multiples of this")
    sizes: tuple[str, ...] = Field(description="all that may be asked for; none: any")
    max_side: int | None = Field(description="width, and height; null: only their product is limited")
    max_pixels: int = Field(description="width times height")
    max_num_inference_steps: int
    max_prompt_characters: int
    max_n: int = MAX_N
    frame_stride: int = Field(description="num_frames must be 1 more than a multiple of this")
    max_num_frames: int
    max_image_bytes: int = Field(description="of each picture that goes in")
    max_image_pixels: int = Field(description="of each picture or frame that goes in, width times height")
    max_video_bytes: int = Field(description="of a video that goes in")


class AdapterCard(BaseModel):
    """One LoRA adapter."""

    name: str
    about: str
    scale: float = Field(description="where a request says none")


class ModelCard(BaseModel):
    """One served model. What follows `owned_by` is beyond OpenAI."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latent-relay"
    family: str
    media: Literal["image", "video"]
    guidance: Literal["guidance_scale", "true_cfg_scale"] = Field(
        description="the field that must be above 1 for a negative prompt to count"
    )
    about: str = Field(description="what the model knows, for people")
    examples: tuple[str, ...] = Field(description="prompts that it draws well")
    calls: dict[CallKind, CallCard] = Field(description="the kinds of call that it serves")
    tiers: dict[Quality, StepCacheConfig | None] = Field(
        description="what a request's `quality` stands for; null: every step computes"
    )
    adapters: tuple[AdapterCard, ...] = Field(description="that a request may name in `lora`, or behind the id")
    parent: str | None = Field(description="of an adapter that is chosen by its id: the model's")
    defaults: ModelDefaults
    limits: ModelLimits

    def with_adapters(self) -> "list[ModelCard]":
        """This model, and itself once more with each adapter, as clients choose one that know of models alone."""
        by_id = {f"{self.id}{SEPARATOR}{adapter.name}": adapter for adapter in self.adapters}
        changes = {id: {"about": adapter.about, "parent": self.id} for id, adapter in by_id.items()}
        return [self, *(self.model_copy(update={"id": id} | own) for id, own in changes.items())]


def model_card(
    model: ModelConfig, created: int, limits: LimitsConfig, adapters: Mapping[str, AdapterConfig]
) -> ModelCard:
    """What its config, its checkpoint and its family say, in this order. adapters: those that there are now."""
    family, own, size, geometry = model.architecture, model.request_defaults, model.default_size, model.geometry
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
        defaults=ModelDefaults(
            **defaults[family.call.kind] | {"fps": own.fps if is_video else None},
            size=f"{size.width}x{size.height}",
            num_frames=size.num_frames if is_video else None,
        ),
        limits=ModelLimits(
            size_multiple=geometry.size_multiple,
            max_side=geometry.max_side,
            max_pixels=limits.max_pixels,
            max_num_inference_steps=limits.max_num_inference_steps,
            max_prompt_characters=limits.max_prompt_characters,
            sizes=tuple(f"{width}x{height}" for width, height in geometry.sizes),
            frame_stride=geometry.frame_multiple,
            max_num_frames=limits.max_num_frames,
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_video_bytes=limits.max_video_bytes,
        ),
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]

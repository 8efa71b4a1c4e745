"""Config of a served model: its checkpoint, and what requests may ask of it."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Self

from pydantic import Field, PrivateAttr, field_validator

from cluster.config import Config
from deployments.families import FAMILIES, Call, Defaults, Family, Geometry
from deployments.memory.config import Dtype
from deployments.options.adapter import ADAPTER_NAME, AdapterConfig
from deployments.options.schedulers import SchedulerConfig
from deployments.options.step_cache import NO_TIERS, Quality, StepCacheConfig, TiersConfig
from deployments.request import CallKind, MediaSize

WARM_UP_SIZE = re.compile(r"(\d{1,5}x\d{1,5})(?:x(\d{1,5}))?")


class DefaultsConfig(Config):
    """Values of fields that a request leaves out; None means the checkpoint's or the family's own default."""

    width: int | None = Field(None, ge=16, description="pixels")
    height: int | None = Field(None, ge=16, description="pixels")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_scale_2: float | None = Field(
        None, ge=0, description="guidance scale of the expert for low noise (Wan 2.2 A14B); null: guidance_scale"
    )
    true_cfg_scale: float | None = Field(None, ge=0)
    negative_prompt: str | None = Field(
        None, description='"": guidance without a negative prompt, if a scale is above 1'
    )
    num_frames: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=1, le=120)
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how much of a sent image is redrawn, if the pipeline has a strength",
    )
    control_scale: float | None = Field(None, ge=0, description="weight of the ControlNet, if there is one")


class ModelConfig(Config):
    """A diffusers checkpoint and the name it is served under."""

    name: str = Field(min_length=1, description="what clients put into `model`")
    checkpoint: str = Field(
        min_length=1,
        description="a local folder, a hub id, embedded://shapes (small, draws coloured shapes), tiny://FAMILY "
        "(smaller, random weights), or, with `config`, one file of a whole model",
    )
    config: str | None = Field(
        None,
        description="for a checkpoint in one file: folder or hub id in diffusers' layout with its configs and "
        "tokenizers",
    )
    components: dict[str, str] = Field(
        {},
        description="weight files that replace the checkpoint's: {transformer: /models/flux1-dev-Q4_K_S.gguf}",
    )
    family: str | None = Field(None, description="null: read from the checkpoint's model_index.json")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(None, description="weight files' variant, such as fp16")
    about: str = Field("", description="what the model can draw: a line for the page and /v1/models")
    examples: tuple[str, ...] = Field((), description="prompts that it draws well, as buttons on the page")
    defaults: DefaultsConfig = DefaultsConfig()
    tiers: TiersConfig = NO_TIERS
    adapters: dict[str, AdapterConfig] = Field(
        {}, description="LoRA adapters that requests may name; loaded at first use"
    )
    adapters_folder: str | None = Field(
        None,
        description="a folder that is watched: NAME.safetensors, or a folder NAME with one, is adapter NAME; "
        "every node must see it",
    )
    schedulers: tuple[SchedulerConfig, ...] = Field(
        (),
        description="schedulers that requests may name besides the checkpoint's own: [UniPCMultistepScheduler, "
        "{name: karras, class_name: DPMSolverMultistepScheduler, options: {use_karras_sigmas: true}}]",
    )
    prompt_weighting: bool = Field(
        False,
        description="compel reads the prompts (only of models whose text encoders are all CLIP): (word)1.3, "
        "word++ and (word:1.3) are weights, and long prompts are read to their end; a request may switch it off. "
        "Needs latent-relay[weighting]",
    )
    warm_up: tuple[str, ...] = Field(
        (),
        description="sizes that every stage runs before it is ready, so that no user waits for compiling: "
        "1024x1024, or 832x480x81 with the frames of a video",
    )

    _geometry: Geometry | None = PrivateAttr(None)
    _vae_dtype: Dtype | None = PrivateAttr(None)
    _derived_family: Family | None = PrivateAttr(None)
    _kinds: tuple[CallKind, ...] | None = PrivateAttr(None)
    """Kinds of call that this checkpoint supports; None: all kinds of its family."""
    _own_scheduler: str | None = PrivateAttr(None)

    @property
    def architecture(self) -> Family:
        """The model's family. Raises ValueError until it is known: see `with_family` (checkpoints/source.py)."""
        if self._derived_family is not None:
            return self._derived_family
        if self.family is None:
            raise ValueError(
                f"the family of {self.checkpoint!r} is not known: set `family:` to one of {', '.join(FAMILIES)}"
            )
        family = FAMILIES[self.family]
        return family if self._kinds is None else replace(family, kinds=self._kinds)

    @property
    def layout(self) -> str:
        """The folder or hub id in diffusers' layout with the configs: `checkpoint`, unless that is one file."""
        return self.config or self.checkpoint

    @property
    def has_derived_family(self) -> bool:
        """Whether the family was derived from the pipeline, because `families` has no entry for it."""
        return self._derived_family is not None

    def with_derived_family(self, family: Family, geometry: Geometry) -> Self:
        """Returns a copy with the family derived from the checkpoint's pipeline (checkpoints/derived.py)."""
        copy = self.with_geometry(geometry)
        copy._derived_family = family
        return copy.model_copy(update={"family": family.name})

    @property
    def request_defaults(self) -> Defaults:
        """Defaults of the kind of call that the checkpoint was saved for."""
        return self.defaults_of(self.architecture.call)

    def defaults_of(self, call: Call) -> Defaults:
        """Returns the configured defaults, and the call's own for fields that are not configured."""
        said = self.defaults.model_dump(exclude_none=True, exclude={"width", "height", "num_frames"})
        for name in ("strength", "control_scale"):
            if getattr(call.defaults, name) is None:
                said.pop(name, None)
        if not call.takes_guidance_scale_2:
            said.pop("guidance_scale_2", None)
        return replace(call.defaults, **said)

    def step_cache_of(self, quality: Quality) -> StepCacheConfig | None:
        """Returns the configured step cache, or else the family's own; None: every step computes."""
        return self.tiers.step_cache(quality) or self.architecture.tiers.step_cache(quality)

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Names that a request may ask for. The checkpoint's own scheduler, the default, comes first if known."""
        own = () if self._own_scheduler is None else (self._own_scheduler,)
        return tuple(dict.fromkeys((*own, *(each.asked_as for each in self.schedulers))))

    @property
    def own_scheduler(self) -> str | None:
        """Class of the checkpoint's own scheduler; None until checkpoints/components.py has read it."""
        return self._own_scheduler

    def with_own_scheduler(self, class_name: str) -> Self:
        """Returns a copy with the class of the checkpoint's own scheduler."""
        copy = self.model_copy()
        copy._own_scheduler = class_name
        return copy

    @property
    def geometry(self) -> Geometry:
        """Sizes that the checkpoint makes. Raises ValueError until checkpoints/geometry.py has read them."""
        if self._geometry is None:
            raise ValueError(f"the sizes that {self.checkpoint!r} makes are not known")
        return self._geometry

    @property
    def has_geometry(self) -> bool:
        return self._geometry is not None

    @property
    def default_size(self) -> MediaSize:
        """The configured size, or else the checkpoint's own. Raises ValueError if neither is known."""
        said, own = self.defaults, self.geometry
        width, height = said.width or own.width, said.height or own.height
        if width is None or height is None:
            raise ValueError(
                f"model.defaults: width and height must be set, because the transformer or unet of "
                f"{self.checkpoint!r} has no sample_size"
            )
        return MediaSize(width, height, said.num_frames or own.num_frames)

    @property
    def takes_adapters(self) -> bool:
        return bool(self.adapters) or self.adapters_folder is not None

    @property
    def vae_dtype(self) -> Dtype | None:
        """Dtype of the decode stage, if it is known: some pipelines scale their latents back in this dtype."""
        return self._vae_dtype

    def with_vae_dtype(self, dtype: Dtype) -> Self:
        """Returns a copy with the decode stage's dtype, for the other stages."""
        copy = self.model_copy()
        copy._vae_dtype = dtype
        return copy

    def with_kinds(self, kinds: Collection[CallKind]) -> Self:
        """Returns a copy that only supports these kinds of call."""
        if len(kinds) == len(self.architecture.calls):
            return self
        copy = self.model_copy()
        copy._kinds = tuple(kinds)
        return copy

    def with_geometry(self, geometry: Geometry) -> Self:
        """Returns a copy with the sizes that its checkpoint makes."""
        copy = self.model_copy()
        copy._geometry = geometry
        return copy

    @field_validator("family")
    @classmethod
    def _check_family(cls, family: str | None) -> str | None:
        if family is not None and family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; allowed: {', '.join(FAMILIES)}")
        return family

    @field_validator("adapters")
    @classmethod
    def _check_adapters(cls, adapters: dict[str, AdapterConfig]) -> dict[str, AdapterConfig]:
        for name in adapters:
            if not ADAPTER_NAME.fullmatch(name):
                raise ValueError(
                    f"an adapter's name has letters, digits, dots, dashes and underscores, got {name!r}"
                )
        return adapters

    @field_validator("schedulers")
    @classmethod
    def _check_schedulers(cls, schedulers: tuple[SchedulerConfig, ...]) -> tuple[SchedulerConfig, ...]:
        names = [each.asked_as for each in schedulers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two schedulers are called {twice!r}: give one of them another name")
        return schedulers

    @field_validator("warm_up")
    @classmethod
    def _check_warm_up(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            if not WARM_UP_SIZE.fullmatch(size):
                raise ValueError(f"a size is WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, got {size!r}")
        return sizes

"""What may be said of the model and of each stage."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from cluster.config import Config
from cluster.resources import ResourceConfig
from deployments.adapter import ADAPTER_NAME, AdapterConfig
from deployments.families import FAMILIES, Call, Defaults, Family, Geometry
from deployments.memory.config import OFF, Dtype, MemoryConfig, TilingConfig
from deployments.request import CallKind, MediaSize
from deployments.step_cache import NO_TIERS, Quality, StepCacheConfig, TiersConfig

WARM_UP_SIZE = re.compile(r"(\d{1,5}x\d{1,5})(?:x(\d{1,5}))?")


class DefaultsConfig(Config):
    """What a request that leaves a field out gets; None means the checkpoint's or the family's own default."""

    width: int | None = Field(None, ge=16, description="pixels")
    height: int | None = Field(None, ge=16, description="pixels")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_scale_2: float | None = Field(
        None, ge=0, description="of the expert for low noise (Wan 2.2 A14B); None: guidance_scale"
    )
    true_cfg_scale: float | None = Field(None, ge=0)
    negative_prompt: str | None = Field(None, description='"" guides away from no prompt, if a scale is above 1')
    num_frames: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=1, le=120)
    strength: float | None = Field(
        None, gt=0, le=1, description="how much of a picture that goes in is drawn anew, where that can be said"
    )
    control_scale: float | None = Field(None, ge=0, description="how loud a ControlNet is, where there is one")


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
        description="of a checkpoint in one file: the folder or hub id in diffusers' layout with its configs and "
        "tokenizers",
    )
    components: dict[str, str] = Field(
        {},
        description="files of weights instead of the checkpoint's: {transformer: /models/flux1-dev-Q4_K_S.gguf}",
    )
    family: str | None = Field(None, description="None: read from the checkpoint's model_index.json")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(None, description="weight files' variant, such as fp16")
    about: str = Field("", description="what the model knows: a line for people, on the page and in /v1/models")
    examples: tuple[str, ...] = Field((), description="prompts that it draws well, to click on the page")
    defaults: DefaultsConfig = DefaultsConfig()
    tiers: TiersConfig = NO_TIERS
    adapters: dict[str, AdapterConfig] = Field(
        {}, description="LoRA adapters that requests may name: loaded at first use, several at once"
    )
    adapters_folder: str | None = Field(
        None,
        description="a folder that is watched: NAME.safetensors, or a folder NAME with one, is adapter NAME; "
        "every node must see it",
    )
    warm_up: tuple[str, ...] = Field(
        (),
        description="sizes that every stage runs through before it is ready, so that no user waits for compiling: "
        "1024x1024, or with the frames of a video 832x480x81",
    )

    _geometry: Geometry | None = PrivateAttr(None)
    _vae_dtype: Dtype | None = PrivateAttr(None)
    _derived_family: Family | None = PrivateAttr(None)
    _kinds: tuple[CallKind, ...] | None = PrivateAttr(None)
    """Of call, which this checkpoint can do, where its family can do more."""

    @property
    def architecture(self) -> Family:
        """Raises ValueError where the family is not said; `with_family` (checkpoints/source.py) reads it."""
        if self._derived_family is not None:
            return self._derived_family
        if self.family is None:
            raise ValueError(f"the family of {self.checkpoint!r} is not known here: one of {', '.join(FAMILIES)}")
        family = FAMILIES[self.family]
        return family if self._kinds is None else replace(family, kinds=self._kinds)

    @property
    def layout(self) -> str:
        """The checkpoint in diffusers' layout that has its configs: itself, unless it is in one file."""
        return self.config or self.checkpoint

    @property
    def has_derived_family(self) -> bool:
        """Whether its pipeline has told of itself, for want of an entry in `families`."""
        return self._derived_family is not None

    def with_derived_family(self, family: Family, geometry: Geometry) -> Self:
        """A copy that runs as this checkpoint's pipeline says (checkpoints/derived.py)."""
        copy = self.with_geometry(geometry)
        copy._derived_family = family
        return copy.model_copy(update={"family": family.name})

    @property
    def request_defaults(self) -> Defaults:
        """Of the kind of call that the checkpoint was saved for."""
        return self.defaults_of(self.architecture.call)

    def defaults_of(self, call: Call) -> Defaults:
        """What is said here, and the call's own where nothing is."""
        said = self.defaults.model_dump(exclude_none=True, exclude={"width", "height", "num_frames"})
        for name in ("strength", "control_scale"):
            if getattr(call.defaults, name) is None:
                said.pop(name, None)
        if not call.takes_guidance_scale_2:
            said.pop("guidance_scale_2", None)
        return replace(call.defaults, **said)

    def step_cache_of(self, quality: Quality) -> StepCacheConfig | None:
        """What is said here, and the architecture's own where nothing is; None: every step computes."""
        return self.tiers.step_cache(quality) or self.architecture.tiers.step_cache(quality)

    @property
    def geometry(self) -> Geometry:
        """Raises ValueError until it was read from the checkpoint: `with_geometry` (checkpoints/geometry.py)."""
        if self._geometry is None:
            raise ValueError(f"what sizes {self.checkpoint!r} makes is not known here")
        return self._geometry

    @property
    def has_geometry(self) -> bool:
        return self._geometry is not None

    @property
    def default_size(self) -> MediaSize:
        """What is said here, and the checkpoint's own where nothing is. Raises ValueError if that is nothing."""
        said, own = self.defaults, self.geometry
        width, height = said.width or own.width, said.height or own.height
        if width is None or height is None:
            raise ValueError(
                f"model.defaults: width and height must be set, for the transformer or unet of "
                f"{self.checkpoint!r} says no sample_size"
            )
        return MediaSize(width, height, said.num_frames or own.num_frames)

    @property
    def takes_adapters(self) -> bool:
        return bool(self.adapters) or self.adapters_folder is not None

    @property
    def vae_dtype(self) -> Dtype | None:
        """That of the decode stage, if it is known: some pipelines scale their latents back in it."""
        return self._vae_dtype

    def with_vae_dtype(self, dtype: Dtype) -> Self:
        """A copy for the other stages."""
        copy = self.model_copy()
        copy._vae_dtype = dtype
        return copy

    def with_kinds(self, kinds: Collection[CallKind]) -> Self:
        """The same, without calls of other kinds."""
        if len(kinds) == len(self.architecture.calls):
            return self
        copy = self.model_copy()
        copy._kinds = tuple(kinds)
        return copy

    def with_geometry(self, geometry: Geometry) -> Self:
        """The same, and what sizes its checkpoint makes."""
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

    @field_validator("warm_up")
    @classmethod
    def _check_warm_up(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            if not WARM_UP_SIZE.fullmatch(size):
                raise ValueError(f"a size is WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, got {size!r}")
        return sizes


def _gpu_by_any_name(device: object) -> object:
    """torch's own names are taken too: a process has one kind of GPU, and knows which."""
    return "gpu" if device in ("cuda", "xpu") else device


class StageConfig(MemoryConfig, ResourceConfig):
    """What every stage may be told."""

    device: Annotated[Literal["auto", "cpu", "gpu"], BeforeValidator(_gpu_by_any_name)] = Field(
        "auto", description="auto: the GPU where Ray gives the replica one and torch sees it, else the CPU"
    )
    torch_threads: int | None = Field(
        None, ge=1, description="CPU threads of one torch operation; None: num_cpus, at least 1"
    )

    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="weights and tensors of each process, in GiB: larger requests are refused, forwards that do "
        "not fit wait, and on a GPU torch takes no more; None: what num_gpus says, on the CPU no limit",
    )

    @property
    def num_ranks(self) -> int:
        """Processes of one replica, each with these resources."""
        return 1

    @property
    def reports_load(self) -> bool:
        """Whether replicas tell how busy they are; if not, as busy as they have requests."""
        return False

    @property
    def num_threads(self) -> int:
        """CPU threads of one torch operation. What Ray reserves is what is used, so stages do not fight."""
        return self.torch_threads or max(1, int(self.num_cpus))

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.device == "gpu" and not self.num_gpus:
            raise ValueError("device 'gpu' needs num_gpus > 0, or Ray gives the replica no GPU of its own")
        return self


class SpreadConfig(StageConfig):
    """What stages may be told whose models take adapters, and may lie on several GPUs at once."""

    adapter_cache_mib: float = Field(
        1024.0, ge=0, description="LoRA adapters kept on each rank for the next request, in MiB"
    )

    device_map: Literal["auto", "balanced"] | None = Field(
        None,
        description="spread the models of one process over all GPUs Ray gives it (num_gpus), by accelerate; one "
        "layer after another",
    )
    max_memory: dict[str, str] | None = Field(
        None, description='of device_map: memory per device, such as {"0": "14GiB", "cpu": "30GiB"}'
    )

    @model_validator(mode="after")
    def _check_max_memory(self) -> Self:
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory is of device_map: set device_map to auto or balanced")
        return self


class EncoderConfig(SpreadConfig):
    """The text encoders."""

    cache_mib: float = Field(512.0, ge=0, description="embeddings kept per replica, in MiB; 0: none")
    max_sequence_length: int | None = Field(
        None, ge=1, le=1024, description="text tokens per prompt; None: the family's"
    )
    max_batch_size: int | None = Field(
        None,
        ge=1,
        description="prompts that wait, encoded as one batch, where they have as many tokens; 1: each alone; "
        "None: 8 on a GPU, on the CPU or with compile 1",
    )

    @property
    def batch_size(self) -> int:
        """A compiled encoder would be compiled once more for every number of prompts. On a CPU a batch takes about
        as long as its prompts one by one, and keeps the denoiser idle until they come all at once.
        """
        return self.max_batch_size or (8 if self.num_gpus and self.compile is None else 1)

    @model_validator(mode="after")
    def _check_spread(self) -> Self:
        if self.device_map is not None and self.quantization is not None:
            raise ValueError(
                "quantization and device_map do not combine for text encoders, which quantised fit one GPU: leave "
                "out device_map"
            )
        return self


class TransformerConfig(SpreadConfig):
    """The denoisers: a transformer or a UNet, of some checkpoints several."""

    shards: int = Field(
        1, ge=1, le=64, description="consecutive block ranges, each on resources of its own (per num_gpus)"
    )
    context_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="ranks that share each forward of a block range, each with all of its weights and a part of "
        "the sequence: a request is done sooner; shards times as many ranks, each on resources of its own",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="ranks that share each forward of a block range, each with a part of its large matrices; "
        "shards times as many ranks, each on resources of its own",
    )
    cuts: tuple[int, ...] | None = Field(
        None,
        description="blocks of each denoiser at which shards begin, such as [19, 38]; None: balanced by bytes",
    )
    transport: Literal["auto", "object_store"] = Field(
        "auto",
        description="how shards hand on: NCCL or gloo, by where they lie; or Ray's object store, several times "
        "slower, where shards cannot open connections to each other",
    )
    stuck_after_s: float | None = Field(
        None,
        gt=0,
        description="a micro-batch that is under way for longer means that a shard is stuck; waiting for a turn "
        "must fit, and compiling (with compile it is times the shards); None: 120, with compile 1800",
    )
    max_batch_size: int = Field(8, ge=1, description="forwards of different requests merged into one")
    batch_wait_ms: float = Field(
        3.0, ge=0, description="how long a batch waits for a request that is between two steps"
    )
    max_batch_tokens: int | None = Field(
        4096, ge=1, description="latent positions per merged forward; beyond it merging stops paying"
    )
    parallel_guidance: bool | None = Field(
        None,
        description="both passes of guidance under way at once, where the pipeline runs two; None: over several "
        "shards. true over one shard merges the two, which changes the last bits",
    )

    @property
    def num_shards(self) -> int:
        """Block ranges: explicit cuts count, or `shards`."""
        return len(self.cuts) + 1 if self.cuts else self.shards

    @property
    def parallel_degree(self) -> int:
        """Ranks that share each forward of a block range."""
        return self.context_parallel * self.tensor_parallel

    @property
    def num_ranks(self) -> int:
        """Of a shard group; those of one block range are next to each other."""
        return self.num_shards * self.parallel_degree

    @property
    def runs_passes_at_once(self) -> bool:
        return self.num_shards > 1 if self.parallel_guidance is None else self.parallel_guidance

    @property
    def reports_load(self) -> bool:
        return True

    @property
    def stuck_limit_s(self) -> float:
        """A forward of a new kind is compiled by one rank after the other, and none comes back meanwhile."""
        is_compiled = self.compile is not None
        return (self.stuck_after_s or (1800.0 if is_compiled else 120.0)) * (self.num_shards if is_compiled else 1)

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.cuts is not None and (list(self.cuts) != sorted(set(self.cuts)) or min(self.cuts, default=0) < 1):
            raise ValueError(f"cuts must be rising block numbers from 1, got {list(self.cuts)}")
        if self.cuts is not None and self.shards not in (1, len(self.cuts) + 1):
            raise ValueError(f"{len(self.cuts)} cuts make {len(self.cuts) + 1} shards, got shards: {self.shards}")
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        """Of what shares forwards; what does not combine stands in memory/conflicts.py."""
        if 0 < self.num_gpus <= 0.5 and self.parallel_degree > 1:
            raise ValueError(
                f"ranks that share each forward need a GPU each, and num_gpus: {self.num_gpus:g} shares one: "
                "set it above 0.5"
            )
        return self


class VaeConfig(StageConfig):
    """The VAE, and the encoder of pictures and videos."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload is not None and self.offload.use_stream and self.offload.level == "leaf":
            # Nobody calls a VAE's forward, at which diffusers would learn the order of its layers.
            raise ValueError("offload.use_stream fetches nothing ahead in a VAE layer by layer: set level: block")
        return self

    cache_mib: float = Field(
        64.0, ge=0, description="what it made of pictures that go in, kept per replica, in MiB; 0: none"
    )
    slicing: bool = Field(False, description="decode a batch one picture at a time")
    tiling: Annotated[TilingConfig | None, OFF] = Field(
        None, description="decode in overlapping tiles, in bounded memory; seams are blended"
    )

    @property
    def spreads_tiles(self) -> bool:
        """Not where weights come for a decode as a whole."""
        return self.tiling is not None and self.tiling.spread and self.max_replicas > 1 and not self.moves_weights

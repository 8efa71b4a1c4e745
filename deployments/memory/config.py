"""What a stage may be told about memory and kernels, a line each: `quantization: nf4`, `offload: group`."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cluster.config import Config
from deployments.memory.conflicts import find_conflict

Dtype = Literal["float32", "bfloat16", "float16"]
GGUF_WEIGHTS = "diffusion_pytorch_model.gguf"
"""Of a component's folder whose weights stay in a GGUF file: a link to it."""


class Technique(Config):
    """A config that a single value may stand for: `true`, or the value of the key named `main_key`."""

    main_key: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if value is True:
            return {}
        return value if isinstance(value, dict | Technique) else {cls.main_key: value}


class QuantizationConfig(Technique):
    """bitsandbytes' weights of 4 or 8 bits. A checkpoint that is stored so needs none of this."""

    main_key = "kind"

    kind: Literal["nf4", "fp4", "int8"] = Field("nf4", description="format of the weights of Linear layers")
    compute_dtype: Dtype | None = Field(None, description="nf4, fp4: of the arithmetic; None: the stage's dtype")
    double_quant: bool = Field(False, description="nf4, fp4: quantise the scales too; saves 0.4 bit per weight")
    threshold: float = Field(
        6.0,
        ge=0,
        description="int8: activations above it are multiplied in 16 bits; 0: none, and no layer looks for them",
    )
    skip_modules: tuple[str, ...] = Field((), description="modules to keep as they are, such as proj_out")
    components: tuple[str, ...] | None = Field(
        None, description="models of the stage to quantise, such as [text_encoder_2]; None: all of them"
    )


class LayerwiseCastingConfig(Technique):
    """Weights stored in 8 bits and cast, layer by layer, for the arithmetic in the stage's dtype."""

    main_key = "storage_dtype"

    storage_dtype: Literal["float8_e4m3fn", "float8_e5m2"] = Field("float8_e4m3fn", description="of the weights")
    skip_patterns: tuple[str, ...] | None = Field(
        None, description="regular expressions of modules to leave; None: the model's own (FLUX: all norms, 3.2 B)"
    )


class CompileConfig(Technique):
    """torch.compile."""

    main_key = "scope"

    scope: Literal["blocks", "model"] = Field(
        "blocks", description="blocks: the repeated ones, compiled once for all; model: as one graph"
    )
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="as torch.compile's"
    )
    fullgraph: bool = Field(False, description="refuse graph breaks")
    dynamic: bool | None = Field(None, description="true: one graph for all sizes; None: torch decides")
    backend: str = Field("inductor", description="as torch.compile's; eager: only trace")

    @property
    def has_graphs(self) -> bool:
        """Whether inductor records CUDA graphs."""
        return self.mode in {"reduce-overhead", "max-autotune"}


class OffloadConfig(Technique):
    """Where weights wait while they are not at work."""

    main_key = "kind"

    kind: Literal["model", "sequential", "group", "disk"] = Field(
        "model",
        description="model: all come for a call and leave when the stage is idle; sequential: layer by layer; "
        "group: block by block, or layer by layer with prefetch; disk: layer by layer from files",
    )
    level: Literal["block", "leaf"] = Field("leaf", description="group: what comes and goes together")
    blocks_per_group: int = Field(1, ge=1, description="group of level block")
    use_stream: bool = Field(False, description="group: fetch the next while this one computes; CUDA only")
    record_stream: bool = Field(False, description="group with use_stream: faster, some more memory")
    non_blocking: bool = Field(False, description="group: copies do not wait")
    low_cpu_memory: bool = Field(False, description="group with use_stream: pin host memory only for the copy")
    folder: str | None = Field(
        None, description="group: keep weights in files under it; disk: None: under the temporary folder"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.record_stream or self.low_cpu_memory) and not self.use_stream:
            raise ValueError("record_stream and low_cpu_memory are of use_stream: set use_stream: true")
        if self.kind != "group" and (self.use_stream or self.non_blocking):
            raise ValueError(f"use_stream and non_blocking are of offload: group, not of {self.kind}")
        if self.folder is not None and self.kind not in {"group", "disk"}:
            raise ValueError(f"folder is of offload: group or disk, not of {self.kind}")
        return self


class OnDemandConfig(Technique):
    """Turns at a device that several stages share: only the weights of whose turn it is are there."""

    main_key = "turn_s"

    turn_s: float = Field(
        10.0, ge=0, description="who has work without end gives way after so many seconds, if another stage waits"
    )


class TilingConfig(Technique):
    """Tiles of a VAE, in pixels."""

    main_key = "tile_size"

    tile_size: int | None = Field(None, ge=64, description="of a tile, in pixels; None: the VAE's own")
    overlap: float = Field(0.25, gt=0, lt=1, description="share of a tile that is blended with the next")
    spread: bool = Field(True, description="tiles of one decode go to the stage's replicas that are idle, too")


def _none_if_off(value: Any) -> Any:
    return None if value is False or value == "none" else value


OFF = BeforeValidator(_none_if_off)
"""`false` and `none` turn a technique off."""


class MemoryConfig(Config):
    """What every stage may be told."""

    dtype: Dtype = Field("float32", description="of weights and arithmetic")
    quantization: Annotated[QuantizationConfig | None, OFF] = Field(None, description="nf4, fp4 or int8")
    layerwise_casting: Annotated[LayerwiseCastingConfig | None, OFF] = Field(
        None, description="float8_e4m3fn or float8_e5m2"
    )
    offload: Annotated[OffloadConfig | None, OFF] = Field(None, description="model, sequential, group or disk")
    vram_limit_gib: float | None = Field(
        None, ge=0, description="weights on the GPU, in GiB; what exceeds them is copied in for its call"
    )
    host_copy: Literal["memory", "files"] = Field(
        "memory",
        description="vram_limit_gib, on_demand: weights wait in pinned host memory, or in the checkpoint's files",
    )
    on_demand: Annotated[OnDemandConfig | None, OFF] = Field(
        None, description="true, or seconds: weights are on the device by turns with other stages that say so"
    )
    compile: Annotated[CompileConfig | None, OFF] = Field(None, description="blocks or model")
    trace: bool = Field(False, description="torch.jit.trace; UNets only")
    channels_last: bool = Field(False, description="memory format of convolutions: UNets and VAEs")
    attention_backend: str | None = Field(
        None, description="diffusers' name, such as native, flash, sage, xformers; None: native"
    )

    def quantizes(self, component: str) -> bool:
        """Whether `quantization`, if it is set, is for this model of the stage."""
        components = None if self.quantization is None else self.quantization.components
        return components is None or component in components

    @property
    def leaves_when_idle(self) -> bool:
        """Whether weights leave the device, or may, when there is no more work."""
        return self.on_demand is not None or (self.offload is not None and self.offload.kind == "model")

    @property
    def has_one_model_at_a_time(self) -> bool:
        """Whether a model that comes to the device sends the stage's others away."""
        return self.offload is not None and self.offload.kind == "model"

    @property
    def moves_weights(self) -> bool:
        """Whether weights come to the device and leave it."""
        return self.offload is not None or self.vram_limit_gib is not None or self.on_demand is not None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.host_copy == "files" and self.vram_limit_gib is None and self.on_demand is None:
            raise ValueError("host_copy is of vram_limit_gib and on_demand: set one of them")
        conflict = find_conflict(self)
        if conflict is not None:
            raise ValueError(conflict)
        return self

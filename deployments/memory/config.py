"""Config of a stage's memory techniques and kernels, one line each: `quantization: nf4`, `offload: group`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cluster.config import Config
from deployments.memory.conflicts import find_conflict

Dtype = Literal["float32", "bfloat16", "float16"]
GGUF_WEIGHTS = "diffusion_pytorch_model.gguf"
"""Name of the link to a GGUF file, in the folder of a component whose weights stay in that file."""


class Technique(Config):
    """A config that may be written as one value: `true`, or the value of the key named `main_key`."""

    main_key: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if value is True:
            return {}
        return value if isinstance(value, dict | Technique) else {cls.main_key: value}


class QuantizationConfig(Technique):
    """Weights quantised to 4 or 8 bits by bitsandbytes. Not needed for a checkpoint that is stored quantised."""

    main_key = "kind"

    kind: Literal["nf4", "fp4", "int8"] = Field("nf4", description="format of the weights of Linear layers")
    compute_dtype: Dtype | None = Field(
        None, description="nf4, fp4: dtype of the arithmetic; null: the stage's dtype"
    )
    double_quant: bool = Field(False, description="nf4, fp4: quantise the scales too; saves 0.4 bit per weight")
    threshold: float = Field(
        6.0,
        ge=0,
        description="int8: activations above this are multiplied in 16 bits; 0: no layer checks for them",
    )
    skip_modules: tuple[str, ...] = Field((), description="modules that are not quantised, such as proj_out")
    components: tuple[str, ...] | None = Field(
        None, description="models of the stage to quantise, such as [text_encoder_2]; null: all"
    )


class LayerwiseCastingConfig(Technique):
    """Weights stored in 8 bits, and cast layer by layer to the stage's dtype for the arithmetic."""

    main_key = "storage_dtype"

    storage_dtype: Literal["float8_e4m3fn", "float8_e5m2"] = Field(
        "float8_e4m3fn", description="dtype of the stored weights"
    )
    skip_patterns: tuple[str, ...] | None = Field(
        None,
        description="regular expressions of modules that are not cast; null: the model's own (FLUX: all norms, "
        "3.2 billion parameters)",
    )


class CompileConfig(Technique):
    """torch.compile."""

    main_key = "scope"

    scope: Literal["blocks", "model"] = Field(
        "blocks",
        description="blocks: compile each kind of repeated block once; model: the whole model as one graph",
    )
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="mode of torch.compile"
    )
    fullgraph: bool = Field(False, description="refuse graph breaks")
    dynamic: bool | None = Field(None, description="true: one graph for all sizes; null: torch decides")
    backend: str = Field("inductor", description="backend of torch.compile; eager: trace only")

    @property
    def has_graphs(self) -> bool:
        """Whether inductor records CUDA graphs."""
        return self.mode in {"reduce-overhead", "max-autotune"}


class OffloadConfig(Technique):
    """Where weights are kept while they are not in use."""

    main_key = "kind"

    kind: Literal["model", "sequential", "group", "disk"] = Field(
        "model",
        description="how weights are moved. model: whole models come for a call and leave when the stage is idle; "
        "sequential: layer by layer; group: block by block, or layer by layer with prefetch; disk: layer by layer "
        "from files",
    )
    level: Literal["block", "leaf"] = Field("leaf", description="group: what is copied in and out together")
    blocks_per_group: int = Field(1, ge=1, description="group with level block: blocks that are copied together")
    use_stream: bool = Field(False, description="group: fetch the next while this one computes; CUDA only")
    record_stream: bool = Field(False, description="group with use_stream: faster, with some more memory")
    non_blocking: bool = Field(False, description="group: the CPU does not wait for copies")
    low_cpu_memory: bool = Field(False, description="group with use_stream: pin host memory only for the copy")
    folder: str | None = Field(
        None,
        description="group: keep weights in files in this folder; disk: the folder of the weights; null: the "
        "temporary folder",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.record_stream or self.low_cpu_memory) and not self.use_stream:
            raise ValueError("record_stream and low_cpu_memory need use_stream: set use_stream: true")
        if self.kind != "group" and (self.use_stream or self.non_blocking):
            raise ValueError(f"use_stream and non_blocking are only for offload: group, not for {self.kind}")
        if self.folder is not None and self.kind not in {"group", "disk"}:
            raise ValueError(f"folder is only for offload: group or disk, not for {self.kind}")
        return self


class TimeSharingConfig(Technique):
    """Stages that share a device use it one after another: only the working stage has its weights there."""

    main_key = "time_slice_s"
    renamed: ClassVar[Mapping[str, str]] = {"turn_s": "time_slice_s"}

    time_slice_s: float = Field(
        10.0, ge=0, description="a stage with endless work gives way to a waiting stage after this many seconds"
    )


class TilingConfig(Technique):
    """The tiles in which a VAE works, in pixels."""

    main_key = "tile_size"

    tile_size: int | None = Field(None, ge=64, description="side of a tile, in pixels; null: the VAE's own")
    overlap: float = Field(0.25, gt=0, lt=1, description="share of a tile that is blended with the next")
    spread: bool = Field(True, description="idle replicas of the stage decode tiles, too")


def _none_if_off(value: Any) -> Any:
    return None if value is False or value == "none" else value


OFF = BeforeValidator(_none_if_off)
"""`false` and `none` turn a technique off."""


class MemoryConfig(Config):
    """Memory and kernel keys of every stage."""

    renamed: ClassVar[Mapping[str, str]] = {"on_demand": "time_sharing"}

    dtype: Dtype = Field("float32", description="dtype of weights and arithmetic")
    quantization: Annotated[QuantizationConfig | None, OFF] = Field(None, description="nf4, fp4 or int8")
    layerwise_casting: Annotated[LayerwiseCastingConfig | None, OFF] = Field(
        None, description="float8_e4m3fn or float8_e5m2"
    )
    offload: Annotated[OffloadConfig | None, OFF] = Field(None, description="model, sequential, group or disk")
    vram_limit_gib: float | None = Field(
        None, ge=0, description="weights kept on the GPU, in GiB; the rest is copied in for each call"
    )
    host_copy: Literal["memory", "files"] = Field(
        "memory",
        description="for vram_limit_gib and time_sharing: weights are kept in pinned host memory, or in the "
        "checkpoint's files",
    )
    time_sharing: Annotated[TimeSharingConfig | None, OFF] = Field(
        None, description="true, or seconds: stages that set this use the device one after another"
    )
    compile: Annotated[CompileConfig | None, OFF] = Field(None, description="blocks or model")
    trace: bool = Field(False, description="torch.jit.trace; UNets only")
    channels_last: bool = Field(False, description="memory format of convolutions: UNets and VAEs")
    attention_backend: str | None = Field(
        None, description="diffusers' name, such as native, flash, sage, xformers; null: native"
    )

    def quantizes(self, component: str) -> bool:
        """Whether `quantization`, if set, applies to this model of the stage."""
        components = None if self.quantization is None else self.quantization.components
        return components is None or component in components

    @property
    def leaves_when_idle(self) -> bool:
        """Whether weights leave the device, or may leave it, when the stage is idle."""
        return self.time_sharing is not None or (self.offload is not None and self.offload.kind == "model")

    @property
    def has_one_model_at_a_time(self) -> bool:
        """Whether a model that comes to the device sends the stage's others away."""
        return self.offload is not None and self.offload.kind == "model"

    @property
    def moves_weights(self) -> bool:
        """Whether weights come to the device and leave it."""
        return self.offload is not None or self.vram_limit_gib is not None or self.time_sharing is not None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.host_copy == "files" and self.vram_limit_gib is None and self.time_sharing is None:
            raise ValueError("host_copy needs vram_limit_gib or time_sharing: set one of them")
        conflict = find_conflict(self)
        if conflict is not None:
            raise ValueError(conflict)
        return self

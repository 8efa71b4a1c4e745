"""The memory that a model needs, in bytes. Pure data: `describe` creates it, all other modules use it to plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.checkpoints.components import Stage
from deployments.config.model import ModelConfig
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.request import MediaSize

STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")
"""In the order in which a request passes through them."""


@dataclass(frozen=True)
class ComponentSizes:
    """One model of a checkpoint, as its stage's config stores it."""

    name: str
    class_name: str
    num_parameters: int
    weights_bytes: int


@dataclass(frozen=True)
class RankSizes:
    """The memory of one process of one replica of a stage."""

    weights_bytes: int
    """All weights of the process, wherever they are."""
    device_bytes: int
    """Most weights on its device at once."""
    working_bytes: int
    """Most bytes of tensors besides weights during one call of the requested sizes."""
    blocks: tuple[tuple[int, int], ...] | None = None
    """Denoise stage only: its block range in each denoiser, in the order of `ModelSizes.denoisers`."""
    shares_time: bool = False
    """Whether it uses `time_sharing`: only one such process at a time has weights and tensors on the device."""
    degree: int = 1
    """Denoise stage only: number of ranks that share each forward, this one included."""
    adapter_bytes: int = 0
    """Adapters that the process may keep for later requests."""

    @property
    def beside_bytes(self) -> int:
        """GPU memory that the process needs besides weights."""
        return self.working_bytes + self.adapter_bytes + OVERHEAD_BYTES

    @property
    def need_bytes(self) -> int:
        """GPU memory that the process needs."""
        return self.device_bytes + self.beside_bytes


@dataclass(frozen=True)
class StageSizes:
    """The memory of one replica of a stage."""

    components: tuple[ComponentSizes, ...]
    ranks: tuple[RankSizes, ...]

    def with_working(self, num_bytes: int) -> "StageSizes":
        return replace(self, ranks=tuple(replace(rank, working_bytes=num_bytes) for rank in self.ranks))

    def with_adapters(self, num_bytes: int) -> "StageSizes":
        return replace(self, ranks=tuple(replace(rank, adapter_bytes=num_bytes) for rank in self.ranks))


@dataclass(frozen=True)
class BlockSizes:
    """One block of a denoiser."""

    name: str
    weights_bytes: int


@dataclass(frozen=True)
class DenoiserSizes:
    """The weights of one denoiser, by the ranks that hold them."""

    name: str
    blocks: tuple[BlockSizes, ...]
    """In forward order; empty if the model cannot be cut."""
    head_bytes: int
    """Held by every rank."""
    tail_bytes: int
    """Held by the last rank."""

    @property
    def weights_bytes(self) -> int:
        return self.head_bytes + sum(block.weights_bytes for block in self.blocks) + self.tail_bytes


@dataclass(frozen=True)
class ModelSizes:
    """The memory of all three stages."""

    encode: StageSizes
    denoise: StageSizes
    decode: StageSizes
    denoisers: tuple[DenoiserSizes, ...]
    """In the order of the checkpoint's index."""
    batch_size: int
    """Number of forwards that `working_bytes` assumes to be merged into one."""
    sizes: tuple[MediaSize, ...]
    """The requested sizes of images or videos."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the denoiser with the fewest: the most shards there can be. 0 if one cannot be cut."""
        return min(len(denoiser.blocks) for denoiser in self.denoisers)

    @property
    def is_unet(self) -> bool:
        return any(denoiser.name == "unet" for denoiser in self.denoisers)

    def with_working(self, measured: Mapping[str, int]) -> "ModelSizes":
        """Returns a copy with working memory by stage as measured, instead of as computed on the meta device."""
        return replace(
            self,
            encode=self.encode.with_working(measured["encode"]),
            denoise=self.denoise.with_working(measured["denoise"]),
            decode=self.decode.with_working(measured["decode"]),
        )

    def stage(self, stage: Stage) -> StageSizes:
        return {"encode": self.encode, "denoise": self.denoise, "decode": self.decode}[stage]


def default_size(model: ModelConfig) -> MediaSize:
    """Returns the size of a request that names none."""
    return model.default_size


def largest(sizes: Sequence[MediaSize]) -> MediaSize:
    """Returns the size with the most pixels."""
    return max(sizes, key=lambda size: size.width * size.height * size.num_frames)

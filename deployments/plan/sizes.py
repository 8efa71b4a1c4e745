"""What a model needs, in bytes. Pure data: `describe` fills it in, everything else plans with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.checkpoints.components import Stage
from deployments.config import ModelConfig
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.request import MediaSize

STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")
"""In the order in which a request meets them."""


@dataclass(frozen=True)
class ComponentSizes:
    """One model of a checkpoint, as its stage's config stores it."""

    name: str
    class_name: str
    num_parameters: int
    weights_bytes: int


@dataclass(frozen=True)
class RankSizes:
    """One process of one replica of a stage."""

    weights_bytes: int
    """What it holds, wherever."""
    device_bytes: int
    """How much of that is on its device at once, at most."""
    working_bytes: int
    """The most that one call of the asked sizes has in tensors besides weights."""
    blocks: tuple[tuple[int, int], ...] | None = None
    """Of the denoise stage: its range of blocks of each denoiser, in the order of `ModelSizes.denoisers`."""
    takes_turns: bool = False
    """`on_demand`: its weights and tensors are on the device only when those of the others that do so are not."""
    degree: int = 1
    """Of the denoise stage: how many ranks share each forward with it, itself counted."""

    @property
    def need_bytes(self) -> int:
        """Of its GPU."""
        return self.device_bytes + self.working_bytes + OVERHEAD_BYTES


@dataclass(frozen=True)
class StageSizes:
    """One replica of a stage."""

    components: tuple[ComponentSizes, ...]
    ranks: tuple[RankSizes, ...]

    def with_working(self, num_bytes: int) -> "StageSizes":
        return replace(self, ranks=tuple(replace(rank, working_bytes=num_bytes) for rank in self.ranks))


@dataclass(frozen=True)
class BlockSizes:
    """One block of a denoiser."""

    name: str
    weights_bytes: int


@dataclass(frozen=True)
class DenoiserSizes:
    """One denoiser, by who holds what of it."""

    name: str
    blocks: tuple[BlockSizes, ...]
    """In forward order; none where the model cannot be cut."""
    head_bytes: int
    """On every rank."""
    tail_bytes: int
    """On the last rank."""

    @property
    def weights_bytes(self) -> int:
        return self.head_bytes + sum(block.weights_bytes for block in self.blocks) + self.tail_bytes


@dataclass(frozen=True)
class ModelSizes:
    """All three stages."""

    encode: StageSizes
    denoise: StageSizes
    decode: StageSizes
    denoisers: tuple[DenoiserSizes, ...]
    """In the order of the checkpoint's index."""
    batch_size: int
    """Forwards merged into one in `working_bytes`."""
    sizes: tuple[MediaSize, ...]
    """What was asked for."""

    @property
    def num_blocks(self) -> int:
        """Of the denoiser that has the fewest: there can be as many shards. 0 where one cannot be cut."""
        return min(len(denoiser.blocks) for denoiser in self.denoisers)

    @property
    def is_unet(self) -> bool:
        return any(denoiser.name == "unet" for denoiser in self.denoisers)

    def with_working(self, measured: Mapping[str, int]) -> "ModelSizes":
        """With measured working memory, by stage, instead of what the meta device told."""
        return replace(
            self,
            encode=self.encode.with_working(measured["encode"]),
            denoise=self.denoise.with_working(measured["denoise"]),
            decode=self.decode.with_working(measured["decode"]),
        )

    def stage(self, stage: Stage) -> StageSizes:
        return {"encode": self.encode, "denoise": self.denoise, "decode": self.decode}[stage]


def default_size(model: ModelConfig) -> MediaSize:
    """What a request gets that asks for none."""
    return model.default_size


def largest(sizes: Sequence[MediaSize]) -> MediaSize:
    """By pixels."""
    return max(sizes, key=lambda size: size.width * size.height * size.num_frames)

"""Config of the decode stage."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from deployments.config.stage import StageConfig
from deployments.memory.config import OFF, TilingConfig


class VaeConfig(StageConfig):
    """The VAE, which decodes latents, and encodes images and videos that are sent."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload is not None and self.offload.use_stream and self.offload.level == "leaf":
            # diffusers learns the order of layers from a model's forward, and a VAE's forward is never called.
            raise ValueError("offload.use_stream has no effect on a VAE with level: leaf: set level: block")
        return self

    shared_with: str | None = Field(
        None,
        description="name of another served model with the same VAE: this model then uses its VAE stage, and no "
        "other key may be set here",
    )
    cache_mib: float = Field(64.0, ge=0, description="encoded input images kept per replica, in MiB; 0: none")
    slicing: bool = Field(False, description="decode a batch one image at a time")
    tiling: Annotated[TilingConfig | None, OFF] = Field(
        None, description="decode in overlapping tiles, in bounded memory; seams are blended"
    )

    @property
    def spreads_tiles(self) -> bool:
        """Whether idle replicas decode tiles, too. Not if weights move to the device for each decode."""
        return self.tiling is not None and self.tiling.spread and self.most_replicas > 1 and not self.moves_weights

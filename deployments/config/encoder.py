"""Config of the encode stage."""

from typing import Self

from pydantic import Field, model_validator

from deployments.config.stage import SpreadConfig


class EncoderConfig(SpreadConfig):
    """The text encoders."""

    shared_with: str | None = Field(
        None,
        description="name of another served model with the same text encoders: this model then uses its encoder, "
        "and no other key may be set here",
    )
    cache_mib: float = Field(512.0, ge=0, description="embeddings kept per replica, in MiB; 0: none")
    max_sequence_length: int | None = Field(
        None, ge=1, le=1024, description="text tokens per prompt; null: the family's"
    )
    max_batch_size: int | None = Field(
        None,
        ge=1,
        description="maximum number of waiting prompts with equally many tokens that are encoded as one batch; 1: "
        "each alone; null: 8 on a GPU, 1 on the CPU or with compile",
    )

    @property
    def has_sessions(self) -> bool:
        """True, so that no replica encodes a prompt that another one has encoded, or is encoding."""
        return True

    @property
    def batch_size(self) -> int:
        """Most prompts that are encoded as one batch. Unless set, 8 on a GPU without `compile`, else 1.

        A compiled encoder would be compiled again for every number of prompts. On a CPU a batch takes about as
        long as its prompts one by one, and keeps the denoiser idle until all of them are done.
        """
        return self.max_batch_size or (8 if self.num_gpus and self.compile is None else 1)

    @model_validator(mode="after")
    def _check_spread(self) -> Self:
        if self.device_map is not None and self.quantization is not None:
            raise ValueError(
                "quantization and device_map do not combine for text encoders, because quantised ones fit one "
                "GPU: leave out device_map"
            )
        return self

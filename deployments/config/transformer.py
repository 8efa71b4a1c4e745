"""Config of the denoise stage: its shards, ranks that share a forward, merging, and the order of requests."""

from typing import Literal, Self

from pydantic import Field, model_validator

from deployments.config.stage import SpreadConfig
from deployments.options.qos import OrderName
from deployments.options.resume import ResumeConfig


class TransformerConfig(SpreadConfig):
    """The denoisers: a transformer or a UNet; some checkpoints have several."""

    shards: int = Field(
        1, ge=1, le=64, description="number of consecutive block ranges, each with its own num_gpus"
    )
    context_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="number of ranks that share each forward of a block range; each has all weights of the range "
        "and a part of the sequence. Makes one request faster. Each shard has this many ranks, each with its own "
        "num_gpus",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="number of ranks that share each forward of a block range; each has a part of its large "
        "matrices. Each shard has this many ranks, each with its own num_gpus",
    )
    cuts: tuple[int, ...] | None = Field(
        None,
        description="blocks of each denoiser at which shards begin, such as [19, 38]; null: balanced by bytes",
    )
    transport: Literal["auto", "object_store"] = Field(
        "auto",
        description="how shards communicate. auto: NCCL or gloo, depending on where they are; object_store: "
        "Ray's, several times slower, for shards that cannot open connections to each other",
    )
    stuck_after_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which a shard counts as stuck in a micro-batch. Must include waiting for "
        "another stage (time_sharing) and compiling (with compile it is multiplied by the number of shards). "
        "null: 120, with compile 1800",
    )
    max_batch_size: int = Field(
        8, ge=1, description="maximum number of forwards of different requests that are merged into one"
    )
    batch_wait_ms: float | None = Field(
        None,
        ge=0,
        description="how long a batch waits for a request that is between two steps; null: a quarter of the "
        "batch's own time, at least 3 ms and at most 100",
    )
    max_batch_tokens: int | None = Field(
        4096, ge=1, description="maximum latent positions per merged forward; merging more does not pay"
    )
    order: OrderName = Field(
        "fair",
        description="order of waiting requests. fair: by priority, fair shares of API keys or users, deadline and "
        "length; fifo: first come, first served",
    )
    max_waiting_requests: int = Field(
        1024,
        ge=0,
        description="requests beyond max_ongoing_requests that wait in a replica, in that order; any more wait in "
        "the ingress, first come, first served",
    )
    parallel_guidance: bool | None = Field(
        None,
        description="run both passes of guidance at once, if the pipeline runs two; null: only with several "
        "shards. With one shard, true merges the two, which changes the last bits",
    )
    resume: ResumeConfig = ResumeConfig()

    @property
    def num_shards(self) -> int:
        """Number of block ranges: by `cuts` if they are set, else `shards`."""
        return len(self.cuts) + 1 if self.cuts else self.shards

    @property
    def parallel_degree(self) -> int:
        """Number of ranks that share each forward of a block range."""
        return self.context_parallel * self.tensor_parallel

    @property
    def num_ranks(self) -> int:
        """Number of ranks of a shard group; ranks of one block range have consecutive numbers."""
        return self.num_shards * self.parallel_degree

    @property
    def runs_passes_at_once(self) -> bool:
        return self.num_shards > 1 if self.parallel_guidance is None else self.parallel_guidance

    @property
    def reports_load(self) -> bool:
        return True

    @property
    def max_held_requests(self) -> int:
        return self.max_ongoing_requests + self.max_waiting_requests

    @property
    def stuck_limit_s(self) -> float:
        """Seconds after which a shard's micro-batch counts as stuck.

        With `compile` it is multiplied by the shards: each rank in turn compiles a forward of a new kind, and no
        result comes back until all have done so.
        """
        is_compiled = self.compile is not None
        return (self.stuck_after_s or (1800.0 if is_compiled else 120.0)) * (self.num_shards if is_compiled else 1)

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.cuts is not None and (list(self.cuts) != sorted(set(self.cuts)) or min(self.cuts, default=0) < 1):
            raise ValueError(f"cuts must be ascending block numbers from 1, got {list(self.cuts)}")
        if self.cuts is not None and self.shards not in (1, len(self.cuts) + 1):
            raise ValueError(f"{len(self.cuts)} cuts make {len(self.cuts) + 1} shards, got shards: {self.shards}")
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        """Raises ValueError if ranks that share forwards would share a GPU; see also memory/conflicts.py."""
        if 0 < self.num_gpus <= 0.5 and self.parallel_degree > 1:
            raise ValueError(
                f"ranks that share each forward need a GPU each, but num_gpus: {self.num_gpus:g} shares one: "
                "set it above 0.5"
            )
        return self

"""The cluster resources that one replica of a stage takes, and the bounds on the number of replicas."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cluster.config import Config

AUTO_REPLICAS = 1000
"""max_replicas passed to Serve, which requires a number, where the cluster is the only bound."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"


def _as_replicas(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or value == "auto" or is_number:
        return value
    raise ValueError(f"must be auto or a whole number of at least 1, got {value!r}")


class ResourceConfig(Config):
    """Resources and replica bounds of one stage."""

    num_cpus: float = Field(1.0, ge=0, description="logical CPUs Ray reserves for each replica (or shard)")
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs Ray reserves for each replica (or shard); below 1 a GPU is shared"
    )
    min_replicas: int = Field(1, ge=0, description="minimum number of replicas; 0 lets the stage sleep")
    max_replicas: Annotated[int | Literal["auto"] | None, BeforeValidator(_as_replicas)] = Field(
        None,
        description="maximum number of replicas; above min_replicas the stage autoscales. auto: as many as the "
        "cluster has room for, shared with the other stages by their times; null: auto if the stage has GPUs and "
        "its weights stay there, else 1",
    )
    target_load: float = Field(
        0.8,
        gt=0,
        description="load per replica that autoscaling aims at; the rest is a reserve for requests that come "
        "while a new replica loads",
    )
    max_ongoing_requests: int = Field(
        32, ge=2, description="requests a replica holds at once; 1 would leave a pipeline of shards empty"
    )
    upscale_delay_s: float = Field(
        5.0, ge=0, description="seconds for which more work must be expected before a replica is added"
    )
    downscale_delay_s: float = Field(120.0, ge=0, description="seconds of low load before a replica is removed")
    accelerator_type: str | None = Field(
        None, description="only nodes with this accelerator, by Ray's name, such as H100"
    )
    labels: dict[str, str] = Field(
        {}, description='only nodes with these Ray labels, such as {"zone": "a"} or {"zone": "!b"}'
    )

    @property
    def max_held_requests(self) -> int:
        """Calls that Serve gives a replica before one has ended."""
        return self.max_ongoing_requests

    @property
    def is_auto(self) -> bool:
        """Whether the cluster is the only bound on the number of replicas."""
        return self.max_replicas == "auto" or (self.max_replicas is None and self.grows_unasked)

    @property
    def grows_unasked(self) -> bool:
        return self.num_gpus > 0

    @property
    def most_replicas(self) -> int:
        """The max_replicas that Serve is given."""
        if self.is_auto:
            return max(AUTO_REPLICAS, self.min_replicas)
        return 1 if self.max_replicas is None or self.max_replicas == "auto" else self.max_replicas

    @property
    def claim(self) -> dict[str, float]:
        """Resources that each process of a replica takes."""
        return {name: amount for name, amount in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if amount}

    @property
    def label_selector(self) -> dict[str, str]:
        """Ray's label selector for nodes that may hold a replica. Ray itself labels nodes by accelerator."""
        accelerator = {} if self.accelerator_type is None else {ACCELERATOR_LABEL: self.accelerator_type}
        return accelerator | self.labels

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.most_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas ({self.min_replicas}), got {self.most_replicas}"
            )
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(
                f"num_gpus must be a fraction up to 1 or a whole number (Ray's rule), got {self.num_gpus}"
            )
        return self

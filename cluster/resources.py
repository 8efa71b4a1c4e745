"""What one replica of a stage takes from the cluster, and how many replicas there may be."""

from typing import Self

from pydantic import Field, model_validator

from cluster.config import Config

ACCELERATOR_LABEL = "ray.io/accelerator-type"


class ResourceConfig(Config):
    """Resources and replica bounds of one stage."""

    num_cpus: float = Field(1.0, ge=0, description="logical CPUs Ray reserves for each replica (or shard)")
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs Ray reserves for each replica (or shard); below 1 a GPU is shared"
    )
    min_replicas: int = Field(1, ge=0, description="fewest replicas; 0 lets the stage sleep")
    max_replicas: int = Field(1, ge=1, description="most replicas; above min_replicas the stage autoscales")
    target_load: float = Field(
        0.8,
        gt=0,
        description="what autoscaling aims at per replica, over what it can do at once; the rest is reserve for "
        "requests that come while a new one loads",
    )
    max_ongoing_requests: int = Field(
        32, ge=2, description="requests a replica holds at once; 1 would leave a pipeline of shards empty"
    )
    upscale_delay_s: float = Field(5.0, ge=0, description="seconds of high load before a replica is added")
    downscale_delay_s: float = Field(120.0, ge=0, description="seconds of low load before one is removed")
    accelerator_type: str | None = Field(None, description="only nodes with this one, by Ray's name, such as H100")
    labels: dict[str, str] = Field(
        {}, description='only nodes with these Ray labels, such as {"zone": "a"} or {"zone": "!b"}'
    )

    @property
    def label_selector(self) -> dict[str, str]:
        """Labels of a node that may hold a replica, as Ray wants them. Ray labels nodes by accelerator itself."""
        accelerator = {} if self.accelerator_type is None else {ACCELERATOR_LABEL: self.accelerator_type}
        return accelerator | self.labels

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas ({self.min_replicas}), got {self.max_replicas}"
            )
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(
                f"num_gpus must be a fraction up to 1 or a whole number (Ray's rule), got {self.num_gpus}"
            )
        return self

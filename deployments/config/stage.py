"""Config of every stage, and of stages whose models may be spread over several GPUs."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cluster.replicas.resources import ResourceConfig
from deployments.memory.config import MemoryConfig


def _gpu_by_any_name(device: object) -> object:
    """Returns "gpu" for torch's own names, too: a process has only one kind of GPU."""
    return "gpu" if device in ("cuda", "xpu") else device


class StageConfig(MemoryConfig, ResourceConfig):
    """Keys that every stage has."""

    device: Annotated[Literal["auto", "cpu", "gpu"], BeforeValidator(_gpu_by_any_name)] = Field(
        "auto", description="auto: the GPU, if Ray gives the replica one and torch sees it, else the CPU"
    )
    torch_threads: int | None = Field(
        None, ge=1, description="CPU threads of one torch operation; null: num_cpus, at least 1"
    )

    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="limit of weights and tensors of each process, in GiB: larger requests are refused, forwards "
        "that do not fit wait, and on a GPU torch takes no more; null: the share num_gpus; on the CPU no limit",
    )

    @property
    def num_ranks(self) -> int:
        """Number of processes of one replica, each with this config's resources."""
        return 1

    @property
    def reports_load(self) -> bool:
        """Whether replicas report their load; if not, their load is their number of requests."""
        return False

    @property
    def grows_unasked(self) -> bool:
        """Whether the number of replicas is unlimited by default: only if the stage's weights stay on a GPU.

        If weights move to and from it, each replica has a copy of them in its node's memory.
        """
        return self.num_gpus > 0 and not self.moves_weights

    @property
    def has_sessions(self) -> bool:
        """Whether requests that have much in common should go to the same replica."""
        return False

    @property
    def num_threads(self) -> int:
        """CPU threads of one torch operation: by default those Ray reserves, so that stages do not compete."""
        return self.torch_threads or max(1, int(self.num_cpus))

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.device == "gpu" and not self.num_gpus:
            raise ValueError("device 'gpu' needs num_gpus > 0, because Ray otherwise gives the replica no GPU")
        return self


class SpreadConfig(StageConfig):
    """Keys of stages whose models take adapters, and may be spread over several GPUs."""

    adapter_cache_mib: float = Field(
        1024.0, ge=0, description="LoRA adapters kept on each rank for the next request, in MiB"
    )

    device_map: Literal["auto", "balanced"] | None = Field(
        None,
        description="accelerate spreads the models of one process over all GPUs that Ray gives it (num_gpus), one "
        "layer after another",
    )
    max_memory: dict[str, str] | None = Field(
        None, description='for device_map: memory per device, such as {"0": "14GiB", "cpu": "30GiB"}'
    )

    @model_validator(mode="after")
    def _check_max_memory(self) -> Self:
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory needs device_map: set device_map to auto or balanced")
        return self

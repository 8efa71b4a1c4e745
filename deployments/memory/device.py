"""Resolves a stage's device and dtype to torch's objects."""

import logging

import torch

from cluster.machines import accelerator
from cluster.machines.nodes import driver_memory_bytes
from deployments.config.stage import StageConfig
from deployments.memory.config import Dtype

log = logging.getLogger("ray.serve")


def resolve_device(config: StageConfig) -> torch.device:
    """Returns the stage's device.

    `auto` is the GPU if Ray gave this replica one, else the CPU; also the CPU if Ray's GPU does not really exist.
    Raises RuntimeError if there is a GPU that torch cannot use.
    """
    if config.device == "cpu" or not config.num_gpus:
        return torch.device("cpu")
    device = accelerator.find_device()
    if device is not None:
        return device
    if config.device != "auto" or driver_memory_bytes():
        raise RuntimeError(
            f"num_gpus is {config.num_gpus:g}, but torch {torch.__version__} sees no GPU: is torch built for this "
            f"GPU (it is built for {_built_for()}), and is the driver new enough (nvidia-smi, rocm-smi, xpu-smi)?"
        )
    log.warning("num_gpus is %g, but there is no GPU here: the stage runs on the CPU", config.num_gpus)
    return torch.device("cpu")


def _built_for() -> str:
    version = torch.version
    builds = {"CUDA": version.cuda, "ROCm": version.hip, "XPU": version.xpu}
    return ", ".join(f"{name} {number}" for name, number in builds.items() if number) or "the CPU only"


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

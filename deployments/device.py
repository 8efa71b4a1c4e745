"""A stage's device and dtype, as torch names them."""

import logging

import torch

from cluster import accelerator
from cluster.nodes import driver_memory_bytes
from deployments.config import StageConfig
from deployments.memory.config import Dtype

log = logging.getLogger("ray.serve")


def resolve_device(config: StageConfig) -> torch.device:
    """`auto` is the GPU where Ray gave this replica one, and the CPU else, or where GPUs are names only.

    Raises RuntimeError where there is a GPU that torch cannot use.
    """
    if config.device == "cpu" or not config.num_gpus:
        return torch.device("cpu")
    device = accelerator.find_device()
    if device is not None:
        return device
    if config.device != "auto" or driver_memory_bytes():
        raise RuntimeError(
            f"num_gpus is {config.num_gpus:g}, and torch {torch.__version__} sees no GPU: is it a build for this "
            f"one (it is for {_built_for()}), and the driver new enough for it (nvidia-smi, rocm-smi, xpu-smi)?"
        )
    log.warning("num_gpus is %g, and there is no GPU here: the stage runs on the CPU", config.num_gpus)
    return torch.device("cpu")


def _built_for() -> str:
    version = torch.version
    builds = {"CUDA": version.cuda, "ROCm": version.hip, "XPU": version.xpu}
    return ", ".join(f"{name} {number}" for name, number in builds.items() if number) or "the CPU alone"


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

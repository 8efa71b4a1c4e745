"""A stage's device and dtype, as torch names them."""

import logging

import torch

from cluster.nodes import driver_memory_bytes
from deployments.config import StageConfig
from deployments.memory.config import Dtype

log = logging.getLogger("ray.serve")


def resolve_device(config: StageConfig) -> torch.device:
    """`auto` is CUDA where Ray gave this replica a GPU, and the CPU else, or where GPUs are names only.

    Raises RuntimeError where there is a GPU that torch cannot use.
    """
    if config.device == "cpu" or not config.num_gpus:
        return torch.device("cpu")
    if torch.cuda.is_available():
        # With its number, as tensors tell it: accelerate compares the two before it moves anything.
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda" or driver_memory_bytes():
        raise RuntimeError(
            f"num_gpus is {config.num_gpus:g}, and torch {torch.__version__} sees no GPU: is it a build for CUDA "
            f"(it is for {torch.version.cuda or 'the CPU alone'}), and the driver new enough for it (nvidia-smi)?"
        )
    log.warning("num_gpus is %g, and there is no GPU here: the stage runs on the CPU", config.num_gpus)
    return torch.device("cpu")


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

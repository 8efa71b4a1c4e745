"""A stage's device and dtype, as torch names them."""

import torch

from deployments.config import StageConfig
from deployments.memory.config import Dtype


def resolve_device(config: StageConfig) -> torch.device:
    """`auto` is CUDA where Ray gave this replica a GPU and torch sees one, else the CPU."""
    if config.device == "auto":
        return torch.device("cuda" if config.num_gpus and torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

"""What a process that is about to import diffusers can do without."""

import logging
import sys

from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.source import fetch_configs
from deployments.config import ModelConfig, StageConfig

NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
}
"""What loggers say of optional packages that nothing here needs, as if something had gone wrong."""


def silence_imports() -> None:
    """Leave that out of the log."""
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()


def skip_unneeded(model: ModelConfig, config: StageConfig) -> None:
    """diffusers and transformers import bitsandbytes and gguf where they are installed: 1 s of CPU in every start.

    None in `sys.modules` is Python's own word for a module that must not be imported
    (https://docs.python.org/3/reference/import.html#the-module-cache); the libraries take it for not installed.
    """
    if "diffusers" in sys.modules:
        return
    if config.quantization is None and not is_stored_quantized(model):
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    if not any(file.endswith(".gguf") for file in (model.checkpoint, *model.components.values())):
        sys.modules["gguf"] = None  # type: ignore[assignment]


def is_stored_quantized(model: ModelConfig) -> bool:
    """Whether some component's own config says so."""
    configs = fetch_configs(model.layout, revision=model.revision).glob("*/config.json")
    return any("quantization_config" in read_json(path) for path in configs)
